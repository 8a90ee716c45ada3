"""The audit log: one JSON line for each thing that happened, each holding the hash of the line before.

    event     verdict          a line is written
    start     -                when the helper begins
    asked     -                before an operation is begun
    refused   denied, busy...  when it is not begun, or was found to be forbidden
    done      ok, failed       when it ended; `asked` is the sequence number of its first line
    late      late             the same, for one that the client was told had timed out
    stop      -                when the helper ends (arguments: what was counted only, and what has not ended)

`previous` is the SHA-256 (hex) of the exact bytes of the line before, without its newline; 64 zeros in the first line.
A line is written whole, by one write. What a failed write left of one stays, is ended with "#torn" and a newline, so
that it can be no whole line, and is no part of the chain: the next line's `previous` and `sequence` pass over it, its
`torn` says that it is there. What clients send is escaped twice (Python's unicode_escape, then JSON): it can neither
end a line nor change how one is shown.
"""

import errno
import fcntl
import os
import stat
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from qat_helper.console import say
from qat_shared.messages import AuditHead

# hashlib would map OpenSSL into this process: 3 MiB, and much code for root, for one hash that Python has built in.
try:
    from _sha2 import sha256  # type: ignore[import-not-found,unused-ignore]  # Python 3.12 and later
except ImportError:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        from hashlib import sha256

_FIRST: Final = "0" * 64
_LINE_LIMIT: Final = 16 * 1024
_TAIL: Final = 4 * _LINE_LIMIT  # so a whole line is in it
_TEXT_LIMIT: Final = 600  # of what a client sent, escaped


class AuditError(Exception):
    """The log cannot be written, or is not one: one sentence."""


class Caller(Struct, frozen=True):
    """The process at the other end, as the kernel told when it connected (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


Facts = dict[str, str | int | None]


class Entry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line. What is absent does not apply."""

    sequence: int = 0
    time: str = ""
    event: str
    peer: Caller | None = None
    operation: str = ""
    arguments: Facts = {}
    reason: str = ""
    verdict: str = ""
    result: Facts = {}
    duration_ms: float | None = None
    asked: int = 0
    torn: bool = False
    previous: str = ""


class _Link(Struct):
    """What a line must hold to be continued."""

    sequence: int
    previous: str


def printable(text: str) -> str:
    """Text that a client sent, in plain ASCII."""
    return text.encode("unicode_escape").decode("ascii")[:_TEXT_LIMIT]


class AuditLog:
    """The log at `path`, continued if it is there. `clock` gives the seconds since 1970. Raises AuditError."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._owed: deque[Entry] = deque()
        self._trouble = ""
        try:
            self._descriptor = os.open(
                path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600
            )
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise AuditError(f"the audit log {path} is not a plain file that only this user can write")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            start = max(0, status.st_size - _TAIL)
            tail = os.pread(self._descriptor, _TAIL, start)
        except BlockingIOError:
            raise AuditError(f"another helper writes the audit log {path}") from None
        except OSError as error:
            hint = f"; make {path.parent}, root's, mode 0700" * isinstance(error, FileNotFoundError)
            raise AuditError(f"the audit log {path} cannot be opened: {os.strerror(error.errno or 0)}{hint}") from error
        self.head = self._continue(tail, whole=start == 0)

    def append(self, entry: Entry) -> int:
        """Write a line: its sequence number. Raises AuditError when it is not in the log."""
        while self._owed:
            self._write(self._owed[0])
            self._owed.popleft()
        return self._write(entry)

    def owe(self, entry: Entry) -> None:
        """Write a line about what has happened already; if that fails, it is written before the next line."""
        entry = msgspec.structs.replace(entry, time=self._now())
        try:
            self.append(entry)
        except AuditError:
            # Never many: nothing new is begun until these are written.
            self._owed.append(entry)

    def close(self) -> None:
        """Let another helper write it."""
        os.close(self._descriptor)

    def _continue(self, tail: bytes, *, whole: bool) -> AuditHead:
        *lines, torn = tail.split(b"\n")
        self._torn = torn != b""
        for line in reversed(lines if whole else lines[1:]):
            try:
                link = msgspec.json.decode(line, type=_Link)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                continue  # ended by a newline after a failed write
            return AuditHead(sequence=link.sequence, hash=_digest(line))
        if not whole or not all(line.startswith(b"{") for line in (*lines, torn or b"{")):
            raise AuditError(f"{self._path} is not an audit log of this helper: move it away")
        return AuditHead(sequence=0, hash=_FIRST)

    def _write(self, entry: Entry) -> int:
        line = msgspec.json.encode(
            msgspec.structs.replace(
                entry,
                sequence=self.head.sequence + 1,
                time=entry.time or self._now(),
                torn=self._torn,
                previous=self.head.hash,
            )
        )
        if len(line) > _LINE_LIMIT:  # a defect: nothing that a client sends is so long
            raise AuditError(f"a line of {len(line)} bytes is too long for the audit log: the operation is refused")
        data = b"#torn\n" * self._torn + line + b"\n"
        written, why = 0, "the disk is full"
        try:
            self._check_place()
            written = os.write(self._descriptor, data)
        except OSError as error:
            why = error.strerror or os.strerror(error.errno or 0)
        if written != len(data):
            self._torn = self._torn or written > 0
            self._report(f"the audit log {self._path} cannot be written ({why}): audited operations are refused")
            raise AuditError(self._trouble)
        self._torn = False
        self._report("")
        self.head = AuditHead(sequence=self.head.sequence + 1, hash=_digest(line))
        return self.head.sequence

    def _check_place(self) -> None:
        """Raises OSError when the file that we write is not the one at the path: nobody would see the line."""
        ours, there = os.fstat(self._descriptor), os.stat(self._path, follow_symlinks=False)
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            raise OSError(errno.ESTALE, "it was moved: start the helper again")

    def _now(self) -> str:
        seconds = self._clock()
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"

    def _report(self, trouble: str) -> None:
        if trouble != self._trouble:
            say(trouble or f"the audit log {self._path} can be written again")
        self._trouble = trouble


def _digest(line: bytes) -> str:
    return str(sha256(line).hexdigest())
