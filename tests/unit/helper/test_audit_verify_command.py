"""`audit verify`: its answers and exit status for logs that are empty, no logs, broken everywhere, or being written."""

import json
import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qat_helper.audit.log import LINE_LIMIT, AuditError, AuditLog, Entry, digest
from qat_helper.commands import chain, files
from qat_helper.commands.chain import BEGINNING, Items
from qat_helper.commands.files import open_log
from qat_helper.commands.run import run
from qat_helper.commands.verify import verify
from qat_shared.messages import AuditHead
from support.audit_logs import Written, check, edited, write

CAPTURE = pytest.CaptureFixture[str]
OTHER = "12" * 32


def answer(capfd: CAPTURE, *arguments: object) -> tuple[int, str]:
    """Exit status and standard output. With --json, the status is the same and the object says so."""
    status = run(["audit", "verify", *map(str, arguments)])
    shown = capfd.readouterr()
    assert run(["audit", "verify", "--json", *map(str, arguments)]) == status
    output = capfd.readouterr().out
    if shown.out:
        intact = json.loads(output)["intact"]
        assert status == {True: 0, False: 1, None: 2}[intact]
        assert shown.out.startswith("intact:") == (intact is True)
        assert ("NOT INTACT" in shown.out) == (intact is False)
        assert shown.out.startswith("EMPTY:") == (intact is None)
    else:
        assert (status, output) == (2, "")
    return status, shown.out + shown.err


def written(directory: Path) -> Written:
    """Twelve lines in several files of `directory`."""
    return write(directory, 12, 700)


def head_of(head: AuditHead) -> str:
    return f"{head.sequence}:{head.hash}"


EMPTY: dict[str, tuple[bytes, list[str], int, str]] = {
    "an empty file": (b"", [], 2, "EMPTY: there are no lines"),
    "only a fragment": (b'{"sequence":1,"ti', [], 2, "EMPTY: there are no lines"),
    "only ended fragments": (b'{"sequence":1,"ti#torn\n', [], 2, "EMPTY: there are no lines"),
    "with only --after": (b"", [f"--after=4:{OTHER}"], 2, "EMPTY: there are no lines"),
    "with the head of the beginning": (b"", [f"--head={head_of(BEGINNING)}"], 0, "intact: 0 lines, the head is 0:"),
    "with a head": (b"", [f"--head=6:{OTHER}"], 1, "(no lines): the end was cut off: the chain ends with line 0"),
    "with its own --after as the head": (b"", [f"--after=4:{OTHER}", f"--head=4:{OTHER}"], 0, "intact: 0 lines"),
    "with a head before --after": (b"", [f"--after=4:{OTHER}", f"--head=3:{OTHER}"], 1, "line 3 of the chain, the"),
    "no log": (b"root:x:0:0:root:/root:/bin/sh\n", [], 1, "it is not a line of an audit log\nNOT INTACT: 1 fault in 0"),
    "blank lines": (b"\n\n", [], 1, "they are not lines of an audit log\nNOT INTACT: 1 fault in 0 lines."),
}


@pytest.mark.parametrize(("content", "options", "status", "said"), EMPTY.values(), ids=EMPTY)
def test_a_log_without_lines_is_intact_only_against_a_head(
    tmp_path: Path, capfd: CAPTURE, content: bytes, options: list[str], status: int, said: str
) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(content)
    found, output = answer(capfd, *options, path)
    assert found == status
    assert said in output


def test_an_empty_current_file_after_rotated_ones_is_intact(tmp_path: Path, capfd: CAPTURE) -> None:
    log = written(tmp_path)
    path = tmp_path / "audit.jsonl"
    path.rename(tmp_path / f"audit.jsonl.{log.head.sequence:012d}")
    path.touch()
    status, output = answer(capfd, *sorted(tmp_path.iterdir()))
    assert (status, output.splitlines()[0]) == (0, f"intact: 12 lines, the head is {head_of(log.head)}")


def test_a_missing_rotated_file_is_found(tmp_path: Path, capfd: CAPTURE, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setattr("qat_helper.commands.run.DEFAULT_LOG", tmp_path / "audit.jsonl")
    assert answer(capfd)[0] == 0
    rotated = sorted(tmp_path.glob("audit.jsonl.*"))
    rotated[1].unlink()
    status, output = answer(capfd)
    assert (status, "of the chain removed before it" in output) == (1, True)
    rotated[0].unlink()
    status, output = answer(capfd)
    assert (status, "of the chain, from its beginning, removed before it (or use --after)" in output) == (1, True)


def fifo(path: Path) -> None:
    os.mkfifo(path)


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "cannot be read: No such file or directory"),
    "a directory": (Path.mkdir, "is a directory: name the files in it"),
    "a FIFO": (fifo, "is not a regular file"),
    "an endless device": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("command", ["verify", "show"])
@pytest.mark.parametrize(("make", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_cannot_be_read_has_no_answer(
    tmp_path: Path, capfd: CAPTURE, command: str, make: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "audit.jsonl"
    make(path)
    assert run(["audit", command, str(path)]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert f"{path} {said}" in shown.err


def test_json_has_all_that_the_text_has(tmp_path: Path, capfd: CAPTURE) -> None:
    log = written(tmp_path)
    names = list(log.files)
    paths = [tmp_path / name for name in names]
    with paths[-1].open("ab") as file:
        file.write(b'{"sequ')

    def found() -> dict[str, Any]:
        run(["audit", "verify", "--json", *map(str, paths)])
        shown: dict[str, Any] = json.loads(capfd.readouterr().out)
        return shown

    head = {"sequence": 12, "hash": log.head.hash}
    intact = {"intact": True, "faults": [], "head": head, "lines": 12, "fragments": 1, "unfinished": True}
    assert found() == intact
    paths[1].write_bytes(paths[1].read_bytes().replace(b"BindDriver", b"BindDriveR", 1))
    (fault,) = found().pop("faults")
    assert set(fault) == {"file", "line", "text"}
    assert fault["text"].endswith("that line was changed")
    assert found()["intact"] is False


def test_the_line_that_is_being_written_is_told_apart(tmp_path: Path, capfd: CAPTURE) -> None:
    log = write(tmp_path, 3, 0)
    path = tmp_path / "audit.jsonl"
    content = path.read_bytes()
    for length in (1, content.index(b"\n")):
        path.write_bytes(content + content[:length])
        status, output = answer(capfd, path)
        assert status == 0
        assert output.startswith(
            f"intact: 3 lines, the head is {head_of(log.head)}. Fragments of failed writes: 1. The"
        )
        assert "it may be a line that is being written." in output


def test_many_lines_with_one_cause_are_one_fault() -> None:
    log = {f"{number}": [line] for number, line in enumerate(write_lines(9))}
    lines = [line for (line,) in log.values()]

    def found(changed: list[bytes]) -> list[tuple[int, str]]:
        return [(fault.line, fault.text) for fault in check({"log": changed}).faults]

    assert found([*lines[:3], b"x", b"", b"y", *lines[3:]]) == [
        (4, "was changed or inserted, with the lines up to log:6: they are not lines of an audit log")
    ]
    assert found([*lines[:6], *lines[2:5], *lines[6:]]) == [
        (7, "line 3 of the chain is also at log:3: log:7 was inserted, with the lines up to log:9")
    ]
    assert found([lines[0], *lines[4:7], *lines[1:4], *lines[7:]]) == [
        (2, "is line 5 of the chain, where line 2 belongs: lines were moved"),
        (5, "is line 2 of the chain, where line 8 belongs: it was moved, with the lines up to log:7"),
    ]
    twice = check({"a": lines, "b": lines}).faults
    assert [(fault.file, fault.line) for fault in twice] == [("b", 1)]
    assert twice[0].text == "line 1 of the chain is also at a:1: b:1 was inserted, with the lines up to b:9"


def write_lines(number: int) -> list[bytes]:
    """Lines of a chain, made without a file."""
    found = [b""]
    for sequence in range(1, number + 1):
        previous = digest(found[-1]) if sequence > 1 else BEGINNING.hash
        found.append(b'{"sequence":%d,"event":"asked","previous":"%s"}' % (sequence, previous.encode()))
    return found[1:]


def test_a_log_that_is_broken_everywhere_is_examined_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "MAX_PARTS", 20)
    monkeypatch.setattr("qat_helper.commands.verify.MAX_PARTS", 20)
    lines = [edited(line, previous=OTHER) for line in write_lines(100)]
    head = AuditHead(sequence=100, hash=digest(lines[-1]))
    verdict = check({"log": lines}, head=head)
    assert (verdict.lines, len(verdict.faults), verdict.head) == (100, 21, head)
    assert str(verdict.faults[-1]).startswith("(more): only the first 20 breaks were examined")
    wrong = AuditHead(sequence=100, hash=OTHER)
    assert "is not the expected head" in check({"log": lines}, head=wrong).faults[-1].text


LONG = b'{"sequence":3,"previous":"","reason":"' + b"x" * (LINE_LIMIT + 64)


@pytest.mark.parametrize("line", [LONG + b'"}', LONG + b"#torn", LONG], ids=["a line", "a fragment", "an end"])
def test_a_line_longer_than_any_that_a_helper_writes_is_a_fault(line: bytes) -> None:
    lines = write_lines(2)
    content = b"\n".join((*lines, line)) + (b"" if line is LONG else b"\n")
    for size in (1, 1000, 1 << 20):
        pieces = [content[at : at + size] for at in range(0, len(content), size)]
        (fault,) = verify(Items({"log": pieces})).faults
        assert (fault.line, fault.text) == (3, "was changed or inserted: it is not a line of an audit log")


def entry() -> Entry:
    return Entry(event="asked", operation="BindDriver")


def rotate(log: AuditLog, times: int) -> None:
    """Append lines until the log has been rotated so often."""
    path = log._path
    for _ in range(times):
        before = path.stat().st_ino
        while path.stat().st_ino == before:
            log.append(entry())
        log.append(entry())


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_log_that_is_rotated_while_it_is_listed_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    listed, rotations = files._rotated, iter([times])
    with closing(AuditLog(tmp_path / "audit.jsonl", limit=700)) as log:
        rotate(log, 3)
        head = log.head

        def listed_meanwhile(path: Path) -> list[Path]:
            number = next(rotations, 0)
            rotate(log, number)
            found = listed(path)
            return found[:-2] + found[-1:] if number else found  # a listing may miss what is renamed meanwhile

        monkeypatch.setattr(files, "_rotated", listed_meanwhile)
        found = Items(open_log(tmp_path / "audit.jsonl"))
        last = verify(found, head=head)
        assert last.faults == ()
        rotate(log, 2)
        assert verify(found, head=head) == last, "what is read later is what was opened"


def test_a_rotation_that_has_not_created_the_new_file_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: CAPTURE
) -> None:
    log = written(tmp_path)
    path = tmp_path / "audit.jsonl"
    monkeypatch.setattr("qat_helper.commands.run.DEFAULT_LOG", path)
    path.rename(tmp_path / "audit.jsonl.000000000012")
    waited: list[float] = []
    monkeypatch.setattr("qat_helper.commands.files.time.sleep", waited.append)
    assert run(["audit", "verify"]) == 2, "and not for ever"
    assert f"{path} cannot be read: No such file" in capfd.readouterr().err
    assert len(waited) == files._ATTEMPTS
    monkeypatch.setattr("qat_helper.commands.files.time.sleep", lambda seconds: path.touch())
    assert answer(capfd)[1].startswith(f"intact: 12 lines, the head is {head_of(log.head)}")


def test_a_log_is_intact_at_any_moment_while_a_helper_writes_and_rotates_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    stop = threading.Event()
    with closing(AuditLog(path, limit=100_000)) as log:
        log.append(entry())

        def write_on() -> None:
            while not stop.is_set() and log.head.sequence < 50_000:
                log.append(entry())

        writer = threading.Thread(target=write_on)
        writer.start()
        try:
            for _ in range(40):
                head = log.head
                verdict = verify(Items(open_log(path)), head=head)
                assert verdict.faults == ()
                assert verdict.lines >= head.sequence
        finally:
            stop.set()
            writer.join()


def test_a_file_that_became_shorter_has_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    path = tmp_path / "audit.jsonl"
    found = Items(open_log(path))
    path.write_bytes(b"")
    with pytest.raises(AuditError, match="became shorter while it was read"):
        verify(found)
