"""Copies of the audit log's lines to a pipe, a file or the journal, without waiting for a reader."""

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat_helper.audit import copies
from qat_helper.audit.copies import Copy, copier
from qat_helper.audit.log import AuditError

# The destination of copies stays open as long as the process lives.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def stdout() -> Iterator[None]:
    """Restores standard output afterwards."""
    before = os.dup(1)
    yield
    os.dup2(before, 1)
    os.close(before)


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "journal"))
        listening.setblocking(False)
        monkeypatch.setattr(copies, "JOURNAL", str(tmp_path / "journal"))
        yield listening


def test_an_unread_pipe_does_not_block(stdout: None) -> None:
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    send = copier(Copy.STDOUT)
    lines = [b"%06d" % number + b"x" * 1000 for number in range(200)]
    for line in lines:
        send(line)
    assert os.get_blocking(1), "the shared description is unchanged"
    found = os.read(reading, 1 << 20).splitlines()
    assert found == lines[: len(found)]
    assert len(found) > 50
    send(b"room again")
    assert os.read(reading, 1 << 20) == b"room again\n"
    os.close(reading)
    send(b"nobody")
    os.close(writing)


def test_a_pipe_takes_each_line_whole_or_not_at_all(stdout: None) -> None:
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    send = copier(Copy.STDOUT)
    for _ in range(100):
        send(b"x" * (select.PIPE_BUF - 1))
    found = os.read(reading, 1 << 20)
    assert set(found.splitlines()) == {b"x" * (select.PIPE_BUF - 1)}
    assert found.endswith(b"\n")
    os.close(reading)
    os.close(writing)


def test_a_file_is_appended_to(stdout: None, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"before\n")
    descriptor = os.open(tmp_path / "out", os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.close(descriptor)
    copier(Copy.STDOUT)(b"line")
    assert (tmp_path / "out").read_bytes() == b"before\nline\n"


def test_output_that_cannot_be_nonblocking_is_refused_at_start(stdout: None) -> None:
    ours, theirs = socket.socketpair()
    os.dup2(theirs.fileno(), 1)
    with pytest.raises(AuditError, match="cannot copy to standard output"):
        copier(Copy.STDOUT)
    ours.close()
    theirs.close()


def test_the_journal_receives_one_entry_per_line_without_blocking(journal: socket.socket) -> None:
    send = copier(Copy.JOURNAL)
    send(b'{"sequence":1}')
    assert journal.recv(10_000) == b'PRIORITY=6\nSYSLOG_IDENTIFIER=qat-helper\nMESSAGE={"sequence":1}\n'
    for _ in range(10_000):
        send(b"x" * 1000)
    received = 0
    while select.select([journal], [], [], 0)[0]:
        assert journal.recv(10_000).endswith(b"x\n")
        received += 1
    assert 0 < received < 10_000
    send(b"again")
    assert journal.recv(10_000).endswith(b"MESSAGE=again\n")


def test_a_missing_journal_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "JOURNAL", str(tmp_path / "nobody"))
    copier(Copy.JOURNAL)(b"line")


@pytest.mark.parametrize("where", [Copy.AUTO, Copy.NONE])
@pytest.mark.parametrize("stream", ["", "no", "1:2", "ours"])
def test_auto_chooses_the_journal_when_it_receives_our_output(
    journal: socket.socket, monkeypatch: pytest.MonkeyPatch, where: Copy, stream: str
) -> None:
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}" if stream == "ours" else stream)
    copier(where)(b"line")
    assert bool(select.select([journal], [], [], 0)[0]) == (where is Copy.AUTO and stream == "ours")


def test_outside_a_service_nothing_is_copied(journal: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    copier(Copy.AUTO)(b"line")
    assert not select.select([journal], [], [], 0)[0]
