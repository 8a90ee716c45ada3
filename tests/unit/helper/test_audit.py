"""The audit log: a chain that survives restarts, torn lines, forged reasons and failing disks."""

import hashlib
import json
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qat_helper.audit.log import AuditError, AuditLog, Entry, printable
from qat_helper.commands.chain import Items
from qat_helper.commands.verify import verify
from qat_shared.messages import AuditHead

FIRST = "0" * 64


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def check_chain(lines: list[bytes]) -> list[dict[str, Any]]:
    """Check that every line continues the one before it, from the first line on."""
    previous, found = FIRST, []
    for sequence, line in enumerate(lines, 1):
        record = json.loads(line)
        assert (record["sequence"], record["previous"]) == (sequence, previous)
        previous = hashlib.sha256(line).hexdigest()
        found.append(record)
    return found


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit file sizes: writes beyond the limit fail (EFBIG) or are cut short, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def entry(reason: str = "") -> Entry:
    return Entry(event="asked", operation="BindDriver", reason=reason)


def test_lines_form_a_chain_with_the_time_that_was_passed_in(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, clock=lambda: 1_700_000_000.25)
    assert log.head == AuditHead(sequence=0, hash=FIRST)
    assert [log.append(entry()) for _ in range(3)] == [1, 2, 3]
    lines = path.read_bytes().splitlines()
    assert [record["time"] for record in check_chain(lines)] == ["2023-11-14T22:13:20.250Z"] * 3
    assert log.head == AuditHead(sequence=3, hash=hashlib.sha256(lines[-1]).hexdigest())
    assert path.stat().st_mode & 0o7777 == 0o600


def test_the_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for _ in range(3):
        log = AuditLog(path)
        for number in range(100):
            log.append(entry(f"{number}" * 50))
        head = log.head
        log.close()
        with closing(AuditLog(path)) as again:
            assert again.head == head
    assert len(check_chain(path.read_bytes().splitlines())) == 300


@pytest.mark.parametrize("torn", [b"{", b'{"sequence":3,"time":"2023', b'{"sequence"', b'{"seque\xff'])
def test_a_torn_last_line_is_kept_terminated_and_skipped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append(entry())
    log.append(entry())
    log.close()
    with path.open("ab") as file:
        file.write(torn)
    log = AuditLog(path)
    assert log.append(entry()) == 3
    assert log.append(entry()) == 4
    log.close()
    lines = path.read_bytes().splitlines()
    assert lines.pop(2) == torn + b"#torn"
    assert [record.get("torn", False) for record in check_chain(lines)] == [False, False, True, False]
    with closing(AuditLog(path)) as log:
        assert log.append(entry()) == 5, "also with the torn line in the middle"


def test_a_torn_first_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"sequence":1,"ti')
    path.chmod(0o600)
    with closing(AuditLog(path)) as log:
        assert log.append(entry()) == 1
    with closing(AuditLog(path)) as log:
        assert log.head.sequence == 1


def test_a_line_without_its_newline_is_a_fragment(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append(entry())
    size = path.stat().st_size
    log.append(entry())
    whole = path.stat().st_size
    log.close()
    path.write_bytes(path.read_bytes()[:size])
    log = AuditLog(path)
    with file_size_limit(whole - 1), pytest.raises(AuditError):
        log.append(entry())
    assert log.append(entry()) == 2
    log.close()
    valid = [json.loads(line)["sequence"] for line in path.read_bytes().splitlines() if not line.endswith(b"#torn")]
    assert valid == [1, 2]


@pytest.mark.parametrize("restart", [False, True], ids=["goes on", "is started again"])
@pytest.mark.parametrize("before", [0, 1])
def test_writes_may_fail_at_any_byte_one_after_another(tmp_path: Path, before: int, restart: bool) -> None:
    for first in (1, 7, 50):
        for second in range(20):
            path = tmp_path / f"{first}.{second}"
            log = AuditLog(path)
            for _ in range(before):
                log.append(entry())
            for room in (first, second):
                with file_size_limit(path.stat().st_size + room), pytest.raises(AuditError):
                    log.append(entry())
            if restart:
                log.close()
                log = AuditLog(path)
            for _ in range(2):
                log.append(entry())
            log.close()
            verdict = verify(Items({"log": [path.read_bytes()]}))
            assert (verdict.faults, verdict.lines) == ((), before + 2)


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_log_that_was_moved_away_refuses_lines(tmp_path: Path, how: str) -> None:
    path = tmp_path / "audit.jsonl"
    with closing(AuditLog(path)) as log:
        log.append(entry())
        if how == "deleted":
            path.unlink()
        else:
            path.rename(tmp_path / "audit.jsonl.1")
            path.touch()
        with pytest.raises(AuditError, match="cannot be written"):
            log.append(entry())


def test_a_full_disk_refuses_and_a_line_cut_short_is_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append(entry())
    size = path.stat().st_size
    with file_size_limit(size + 20):
        for _ in range(3):
            with pytest.raises(AuditError, match="cannot be written"):
                log.append(entry())
    assert log.append(entry()) == 2
    lines = path.read_bytes().splitlines()
    assert len(lines.pop(1)) == 20 + len("#torn")
    assert check_chain(lines)[1]["torn"] is True
    said = capfd.readouterr().err.splitlines()
    assert len(said) <= 3
    assert "can be written again" in said[-1]


def test_a_pending_entry_is_written_before_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    times = iter(range(100))
    log = AuditLog(path, clock=lambda: float(next(times)))
    with file_size_limit(0):
        log.enqueue(entry("first"))
        log.enqueue(entry("second"))
        assert log.head.sequence == 0
    log.append(entry("third"))
    found = check_chain(path.read_bytes().splitlines())
    assert [record["reason"] for record in found] == ["first", "second", "third"]
    assert found[0]["time"] < found[1]["time"] < found[2]["time"], "each entry has the time of its event"


FORGED = {
    "a line of its own": 'x"}\n{"sequence":99}',
    "carriage return": "done\rok",
    "terminal escape": "\x1b[2K\x1b[1A",
    "line separators": "a\u2028b\u2029c\x85d",
    "right to left": "\u202egnihtyna",
    "delete": "\x7f\x08",
    "backslash": "\\n",
}


@pytest.mark.parametrize("reason", FORGED.values(), ids=FORGED)
def test_a_reason_cannot_forge_a_line(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append(entry(printable(reason)))
    log.append(entry())
    raw = path.read_bytes()
    assert raw.count(b"\n") == 2
    assert all(0x20 <= byte < 0x7F or byte == 0x0A for byte in raw)
    found = check_chain(raw.splitlines())
    assert found[0]["reason"].encode().decode("unicode_escape") == reason


def test_a_file_that_is_not_an_audit_log_is_refused(tmp_path: Path) -> None:
    for name, content in (("text", b"hello\n"), ("word", b"x"), ("huge", b"x" * 200_000), ("page", b"\n" * 10)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
        with pytest.raises(AuditError, match="is not an audit log"):
            AuditLog(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content


def test_a_log_that_others_may_write_or_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").touch()
    (tmp_path / "open").chmod(0o666)
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (
        tmp_path / "open",
        tmp_path / "link",
        tmp_path / "pipe",
        Path("/dev/full"),
        tmp_path,
        tmp_path / "no/no",
    ):
        with pytest.raises(AuditError, match=str(path)):
            AuditLog(path)


def test_opening_waits_for_the_lock_of_a_killed_helpers_child(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append(entry())
    held = os.dup(log._descriptor)  # the lock belongs to the open file description, which a fork shares
    log.close()
    end = threading.Timer(0.2, os.close, [held])
    end.start()
    assert AuditLog(path).append(entry()) == 2
    end.join()


def test_only_one_helper_writes_the_log(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    with pytest.raises(AuditError, match="another helper"):
        AuditLog(tmp_path / "audit.jsonl")
    log.append(entry())
