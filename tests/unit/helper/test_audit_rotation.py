"""Rotation of the audit log: one chain over all files, even if the process ends between any two steps."""

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from qat_helper.audit.log import AuditError, AuditLog, Entry, Sync
from qat_helper.commands.chain import Items
from qat_helper.commands.verify import Verdict, verify

LIMIT = 1000


def entry(reason: str = "") -> Entry:
    return Entry(event="asked", operation="BindDriver", reason=reason)


def log_in(directory: Path, **options: object) -> AuditLog:
    return AuditLog(directory / "audit.jsonl", limit=LIMIT, **options)  # type: ignore[arg-type]


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("audit.jsonl*"))


def verdict(directory: Path) -> Verdict:
    return verify(Items({str(path): [path.read_bytes()] for path in files(directory)}))


def intact(directory: Path, lines: int) -> None:
    found = verdict(directory)
    assert found.faults == ()
    assert found.lines == found.head.sequence == lines


def test_a_full_file_is_named_after_its_last_line_and_no_line_is_lost(tmp_path: Path) -> None:
    with closing(log_in(tmp_path)) as log:
        for number in range(30):
            log.append(entry(f"{number}"))
    found = files(tmp_path)
    assert len(found) > 5
    assert found[0].name == "audit.jsonl"
    for path in found:
        assert path.stat().st_size <= LIMIT
        assert path.stat().st_mode & 0o7777 == 0o600
    for path in found[1:]:
        last = path.read_bytes().splitlines()[-1]
        assert f'"sequence":{int(path.suffix[1:])},'.encode() in last
    assert [path.name for path in found[1:]] == sorted(path.name for path in found[1:])
    intact(tmp_path, 30)


def test_a_line_longer_than_the_limit_gets_its_own_file(tmp_path: Path) -> None:
    with closing(AuditLog(tmp_path / "audit.jsonl", limit=10)) as log:
        for _ in range(4):
            log.append(entry())
    assert [path.read_bytes().count(b"\n") for path in files(tmp_path)] == [1, 1, 1, 1]
    intact(tmp_path, 4)


def test_no_limit_no_rotation(tmp_path: Path) -> None:
    with closing(AuditLog(tmp_path / "audit.jsonl")) as log:
        for _ in range(30):
            log.append(entry())
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("restart_after", range(1, 12))
def test_restarts_at_any_line_continue_the_chain(tmp_path: Path, restart_after: int) -> None:
    for _ in range(4):
        with closing(log_in(tmp_path)) as log:
            for _ in range(restart_after):
                log.append(entry())
    intact(tmp_path, 4 * restart_after)


class Stopped(BaseException):
    """Simulates the end of the process."""


def close_all(directory: Path) -> None:
    """Close what was opened in the block, as the end of a process does."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{directory}/"):
                os.close(descriptor)


CALLS = ("rename", "open", "write", "close")


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...] = CALLS) -> Callable[[], int]:
    """Have the process end before its system call number `step` that changes something; how many were made."""
    made = itertools.count()
    last = [0]

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            last[0] = next(made)
            if last[0] == step:
                raise Stopped
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    for name in calls:
        wrap(name)
    return lambda: last[0]


def test_the_chain_continues_after_a_kill_between_any_two_steps(tmp_path: Path) -> None:
    for step in itertools.count():
        directory = tmp_path / f"{step}"
        directory.mkdir()
        with pytest.MonkeyPatch.context() as monkeypatch:
            stop_at(step, monkeypatch)
            written = 0
            with suppress(Stopped):
                log = log_in(directory)
                for _ in range(20):
                    log.append(entry())
                    written += 1
        close_all(directory)
        found = verdict(directory)
        assert found.faults == ()
        assert found.lines in (written, written + 1)  # the process may end before it knows of its last line
        with closing(log_in(directory)) as log:
            assert log.head == found.head
            log.append(entry())
        intact(directory, found.lines + 1)
        if written == 20:
            assert len(files(directory)) > 3, "rotations were interrupted"
            assert step > 25
            return


@pytest.mark.parametrize("call", CALLS[:2])
def test_a_failed_rotation_refuses_lines_and_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, capfd: pytest.CaptureFixture[str]
) -> None:
    real = getattr(os, call)

    def fails(*arguments: object, **options: object) -> object:
        if call == "rename" or str(arguments[0]) == str(tmp_path / "audit.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    with closing(log_in(tmp_path)) as log:
        written = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, call, fails)
            with pytest.raises(AuditError, match="No space left"):
                for _ in range(20):
                    log.append(entry())
                    written += 1
            for _ in range(3):
                with pytest.raises(AuditError, match="No space left"):
                    log.append(entry())
            log.enqueue(entry("owed"))
        assert verdict(tmp_path).lines == written
        log.append(entry())
        intact(tmp_path, written + 2)
        assert len(files(tmp_path)) == 2
    assert capfd.readouterr().err.count("cannot be written") == 1


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    with closing(log_in(tmp_path)) as log:
        log.append(entry())
        size = (tmp_path / "audit.jsonl").stat().st_size
        fitting = LIMIT // size
        in_the_way = tmp_path / f"audit.jsonl.{fitting:012d}"
        in_the_way.write_text("precious")
        for _ in range(fitting - 1):
            log.append(entry())
        with pytest.raises(AuditError, match="move it away"):
            log.append(entry())
        assert in_the_way.read_text() == "precious"
        in_the_way.unlink()
        assert log.append(entry()) == fitting + 1
    intact(tmp_path, fitting + 1)


def test_the_fragment_of_a_failed_write_stays_in_its_file(tmp_path: Path) -> None:
    with closing(log_in(tmp_path)) as log:
        for _ in range(4):
            log.append(entry())
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"sequence":5' + b" " * LIMIT)
    with closing(log_in(tmp_path)) as log:
        assert log.append(entry()) == 5
        assert len(files(tmp_path)) == 1
        assert log.append(entry()) == 6
    assert len(files(tmp_path)) == 2
    intact(tmp_path, 6)


OLDER = {
    "its last line is missing": lambda data: b"".join(data.splitlines(keepends=True)[:-1]),
    "it is empty": lambda data: b"",
    "it is not a log": lambda data: b"hello\n" * 100,
}


@pytest.mark.parametrize("change", OLDER.values(), ids=OLDER)
def test_no_new_chain_starts_when_the_end_of_the_old_one_is_missing(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    with closing(log_in(tmp_path)) as log:
        while len(files(tmp_path)) < 3:
            log.append(entry())
    newest = files(tmp_path)[-1]
    (tmp_path / "audit.jsonl").unlink()
    newest.write_bytes(change(newest.read_bytes()))
    with pytest.raises(AuditError, match="does not end with the line that its name gives"):
        log_in(tmp_path)
    close_all(tmp_path)
    newest.unlink()
    newest.symlink_to("/etc/passwd")
    with pytest.raises(AuditError, match="cannot be opened"):
        log_in(tmp_path)
    close_all(tmp_path)


def test_other_files_in_the_directory_are_not_part_of_the_log(tmp_path: Path) -> None:
    for name in (
        "audit.jsonl.1",
        "audit.jsonl.000000000009.gz",
        "audit.jsonl.00000000000x",
        "other.jsonl.000000000009",
    ):
        (tmp_path / name).write_text("not ours")
    with closing(log_in(tmp_path)) as log:
        assert log.append(entry()) == 1


def test_only_one_helper_writes_the_log_across_rotations(tmp_path: Path) -> None:
    with closing(log_in(tmp_path)) as log:
        while len(files(tmp_path)) < 3:
            log.append(entry())
        with pytest.raises(AuditError, match="another helper"):
            log_in(tmp_path)
        log.append(entry())


def test_with_sync_line_each_line_is_flushed_before_anything_follows(tmp_path: Path) -> None:
    flags = {}
    for sync in Sync:
        directory = tmp_path / sync
        directory.mkdir()
        with closing(log_in(directory, sync=sync)) as log:
            while len(files(directory)) < 2:
                log.append(entry())
            text = Path(f"/proc/self/fdinfo/{log._descriptor}").read_text()
            flags[sync] = int(text.split("flags:")[1].split()[0], 8) & os.O_DSYNC
        assert verdict(directory).faults == ()
    assert flags == {Sync.NEVER: 0, Sync.LINE: os.O_DSYNC}


def test_a_line_that_was_not_flushed_refuses_and_is_not_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        real(descriptor, data)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with closing(log_in(tmp_path, sync=Sync.LINE)) as log:
        log.append(entry())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(AuditError, match="Input/output error"):
                log.append(entry())
            log.enqueue(entry("what happened"))
        assert log.append(entry()) == 4
    intact(tmp_path, 4)


def test_copies_are_the_exact_bytes_of_each_line(tmp_path: Path) -> None:
    copies: list[bytes] = []
    with closing(log_in(tmp_path, copy=copies.append)) as log:
        for _ in range(20):
            log.append(entry())
    content = b"".join(path.read_bytes() for path in [*files(tmp_path)[1:], files(tmp_path)[0]])
    assert content == b"".join(line + b"\n" for line in copies)


def test_a_process_that_is_killed_while_it_rotates(tmp_path: Path) -> None:
    """SIGKILL at a random moment, twenty times."""
    code = f"""
import sys
from pathlib import Path
from qat_helper.audit.log import AuditLog, Entry
log = AuditLog(Path({str(tmp_path / "audit.jsonl")!r}), limit=600)
print("ready", flush=True)
while True:
    log.append(Entry(event="asked", operation="BindDriver"))
"""
    for round_ in range(20):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        before = len(files(tmp_path))
        while len(files(tmp_path)) < before + 20:
            pass
        process.kill()
        process.wait()
        process.stdout.close()
        assert verdict(tmp_path).faults == (), round_
    assert len(files(tmp_path)) > 400
