"""`audit verify` and `audit show` of a full log run in the memory that the helper leaves of its container's limit."""

import hashlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from support.helper_process import COMMAND
from support.memory_limit import manifest_limit, memory_limit

HELPER: Final = 20 << 20
"""Bytes that the helper itself uses of the limit."""
ROTATE: Final = 64 << 20
"""Bytes at which the log is rotated by default: the most that one file holds."""
SIZE: Final = ROTATE + (1 << 20)
PART: Final = 12 << 20
"""Bytes of a log that is edited: more than may wait for an operation, and more faults than are told apart."""
_OPERATION: Final = (
    '"peer":{"pid":812,"uid":65532,"gid":65532},"operation":"BindDriver",'
    '"arguments":{"address":"0000:6b:00.1","driver":"vfio-pci"},"reason":"serve it to pods"'
)
_ENDED: Final = '"verdict":"ok","result":{"driver":"vfio-pci","changed":true},"duration_ms":3.4'


def lines() -> Iterator[bytes]:
    """The lines of a chain: operations, each with its two lines."""
    number, previous = 0, "0" * 64
    while True:
        number += 1
        start = f'{{"sequence":{number},"time":"2026-11-24T06:24:06.044Z"'
        if number % 2:
            text = f'{start},"event":"asked",{_OPERATION},"previous":"{previous}"}}'
        else:
            text = f'{start},"event":"done",{_OPERATION},{_ENDED},"asked":{number - 1},"previous":"{previous}"}}'
        line = text.encode()
        previous = hashlib.sha256(line).hexdigest()
        yield line


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A full rotated file and the current one."""
    directory = tmp_path_factory.mktemp("log")
    path = directory / "audit.jsonl"
    file = path.open("wb")
    size = number = 0
    for line in lines():
        if size < ROTATE <= size + len(line) + 1:
            file.close()
            path.rename(directory / f"audit.jsonl.{number:012d}")
            file = path.open("wb")
        size, number = size + len(line) + 1, number + 1
        file.write(line + b"\n")
        if size > SIZE:
            break
    file.close()
    return [*directory.glob("audit.jsonl.*"), path]


@pytest.fixture(scope="module")
def edited(log: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A part of the log after edits at a great many places, twice."""
    directory = tmp_path_factory.mktemp("edited")
    with log[0].open("rb") as source, (directory / "one").open("wb") as file:
        for number, line in enumerate(source):
            if file.tell() > PART:
                break
            if number % 4 == 1:
                file.write(line.replace(b"vfio-pci", b"igb_uio", 1))
            elif number % 4 != 2:
                file.write(line)
    (directory / "two").hardlink_to(directory / "one")
    return sorted(directory.iterdir())


@pytest.fixture(scope="module")
def unpaired(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A file in which the first operation ends with the last line, and all others at once."""
    path = tmp_path_factory.mktemp("unpaired") / "audit.jsonl"
    size = 0
    with path.open("wb") as file:
        file.write(b'{"sequence":1,"event":"asked","operation":"BindDriver","previous":""}\n')
        for number, line in enumerate(lines(), 1):
            size += file.write(line.replace(b'"sequence":', b'"sequence":9').replace(b'"asked":', b'"asked":9') + b"\n")
            if size > PART and number % 2 == 0:
                break
        file.write(b'{"sequence":2,"event":"done","verdict":"late","asked":1,"previous":""}\n')
    return [path]


def audit(what: str, paths: Sequence[Path], *arguments: str) -> tuple[int, str]:
    """Run a command in the limit. Its status, and its first and last lines of output."""
    with memory_limit(manifest_limit("helper") - HELPER) as limit:
        command = limit.wrapped([COMMAND, "audit", what, *arguments, *map(str, paths)])
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        first = last = next(process.stdout, "")
        for line in process.stdout:
            last = line
        said = process.stderr.read()
        status = process.wait()
        process.stdout.close()
        process.stderr.close()
        limit.check()
        limit.note(f"audit {what} of {sum(path.stat().st_size for path in paths) / 2**20:.0f} MiB")
        return status, first + last + said


def test_verify_of_an_intact_log(log: list[Path]) -> None:
    status, said = audit("verify", log)
    assert status == 0, said
    assert said.startswith("intact: ")


def test_verify_of_a_log_with_faults_at_many_places(edited: list[Path]) -> None:
    status, said = audit("verify", edited)
    assert status == 1, said
    assert "NOT INTACT: 10000 faults" in said


def test_show(log: list[Path]) -> None:
    status, said = audit("show", log)
    assert status == 0, said
    heading, last = said.splitlines()
    assert heading.startswith("line ")
    assert last.endswith('| reason: "serve it to pods"')


def test_show_as_json_of_a_log_with_faults_at_many_places(edited: list[Path]) -> None:
    status, said = audit("show", edited, "--json")
    assert status == 0, said
    first, last, *warnings = said.splitlines()
    assert json.loads(first)["operation"] == json.loads(last)["operation"] == "BindDriver"
    assert "this log is not intact (10000 faults)" in warnings[-1]


def test_show_of_an_operation_that_ends_after_all_others(unpaired: list[Path]) -> None:
    status, said = audit("show", unpaired, "--json")
    assert status == 0, said
    first = json.loads(said.splitlines()[0])
    assert (first["sequence"], first["end_sequence"], first["verdict"]) == (1, 2, "late")
