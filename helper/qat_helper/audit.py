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

A full file is renamed after its last line's number (audit.jsonl.000000001234), and the chain goes on in a new one. Were
the helper killed between any two steps of that, the next one finds the chain's end. No file is ever removed.
"""

import errno
import fcntl
import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
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
_ATTEMPTS: Final = 100
"""To lock the file, in 2 s: a child of a helper that was killed has the lock until it has closed what it inherited."""


class Sync(StrEnum):
    """When a line is on the disk: whenever the kernel likes, or before anything follows it."""

    NEVER = "never"
    LINE = "line"


class AuditError(Exception):
    """The log cannot be written, or is not one: one sentence."""


class Caller(Struct, frozen=True):
    """The process at the other end, as the kernel told when it connected (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


Facts = dict[str, str | int | bool | None]


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
    """The log at `path`, continued if it is there. Raises AuditError.

    `clock` gives the seconds since 1970. A file takes up to `limit` bytes (0: any number). `copy` is given each line.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        *,
        sync: Sync = Sync.NEVER,
        limit: int = 0,
        copy: Callable[[bytes], None] = lambda line: None,
    ) -> None:
        self._path = path
        self._clock = clock
        self._sync = sync
        self._limit = limit
        self._copy = copy
        self._owed: deque[Entry] = deque()
        self._trouble = ""
        self._place = path  # where the file is that we write
        try:
            self._descriptor = self._begin()
            tail, whole = _tail(self._descriptor)
            # Of an attempt to end a rest and write a line, just the first part may be there.
            self._torn = tail.endswith(b"#torn\n") or (tail != b"" and not tail.endswith(b"\n"))
            head = _last(tail, whole=whole)
            if head is None and not (whole and all(line.startswith((b"{", b"#torn")) for line in tail.splitlines())):
                raise AuditError(f"{path} is not an audit log of this helper: move it away")
            self.head = head or self._older()
        except OSError as error:
            hint = f"; make {path.parent}, root's, mode 0700" * isinstance(error, FileNotFoundError)
            raise AuditError(f"the audit log {path} cannot be opened: {os.strerror(error.errno or 0)}{hint}") from error

    def append(self, entry: Entry) -> int:
        """Write a line: its sequence number. Raises AuditError: not in the log, or, with Sync.LINE, not on the disk."""
        self._settle()
        self._write(entry)
        if self._trouble:
            raise AuditError(self._trouble)
        return self.head.sequence

    def owe(self, entry: Entry) -> None:
        """Write a line about what has happened already; if that fails, it is written before the next line."""
        # Never many: nothing new is begun until these are written.
        self._owed.append(msgspec.structs.replace(entry, time=self._now()))
        with suppress(AuditError):
            self._settle()

    def close(self) -> None:
        """Let another helper write it."""
        os.close(self._descriptor)

    def _settle(self) -> None:
        while self._owed:
            self._write(self._owed[0])
            self._owed.popleft()

    def _begin(self, flags: int = 0) -> int:
        """Open the file at the path for us alone. Raises OSError, AuditError."""
        flags |= os.O_DSYNC if self._sync is Sync.LINE else 0
        descriptor = _open(self._path, flags | os.O_RDWR | os.O_APPEND | os.O_CREAT)
        for _ in range(_ATTEMPTS):
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            time.sleep(0.02)
        os.close(descriptor)
        raise AuditError(f"another helper writes the audit log {self._path}")

    def _older(self) -> AuditHead:
        """The end of the newest full file; the beginning of a chain if there is none. Raises OSError, AuditError."""
        full = re.compile(re.escape(self._path.name) + r"\.([0-9]{12,})", re.ASCII)
        numbers = [int(match[1]) for name in os.listdir(self._path.parent) if (match := full.fullmatch(name))]
        if not numbers:
            return AuditHead(sequence=0, hash=_FIRST)
        path = self._full_path(max(numbers))
        descriptor = _open(path, os.O_RDONLY)
        tail, whole = _tail(descriptor)
        os.close(descriptor)
        head = _last(tail, whole=whole)
        if head is None or head.sequence != max(numbers):
            raise AuditError(f"{path} does not end with the line that it is named after: qat-helper audit verify")
        return head

    def _full_path(self, sequence: int) -> Path:
        """The name of a full file whose last line has that number."""
        return self._path.with_name(f"{self._path.name}.{sequence:012d}")

    def _rotate(self) -> None:
        """Give the full file its name and begin a new one. After OSError or AuditError, try again."""
        path = self._full_path(self.head.sequence)
        if self._place != path:
            if os.path.lexists(path):
                raise OSError(errno.EEXIST, f"{path} is there: move it away")
            os.rename(self._place, path)
            self._place = path
        descriptor = self._begin(os.O_EXCL)
        os.close(self._descriptor)
        self._descriptor, self._place = descriptor, self._path

    def _write(self, entry: Entry) -> None:
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
        why, before = "", os.fstat(self._descriptor).st_size
        try:
            self._check_place()
            full = before and 0 < self._limit < before + len(data) and not self._torn
            if full or self._place != self._path:
                self._rotate()
                before = 0
            if os.write(self._descriptor, data) != len(data):
                why = os.strerror(errno.ENOSPC)  # as the next attempt will say
        except OSError as error:
            why = error.strerror or os.strerror(error.errno or 0)
        # Not what write(2) said: with O_DSYNC a line may be there whole, and not on the disk.
        written = os.fstat(self._descriptor).st_size - before
        trouble = f"the audit log {self._path} cannot be written ({why}): audited operations are refused"
        self._report(trouble if why else "")
        if written != len(data):
            self._torn = self._torn or written > 0
            raise AuditError(trouble)
        self._torn = False
        self.head = AuditHead(sequence=self.head.sequence + 1, hash=digest(line))
        self._copy(line)

    def _check_place(self) -> None:
        """Raises OSError when the file that we write is not the one there: nobody would see the line."""
        ours, there = os.fstat(self._descriptor), os.stat(self._place, follow_symlinks=False)
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            raise OSError(errno.ESTALE, "it was moved: start the helper again")

    def _now(self) -> str:
        seconds = self._clock()
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"

    def _report(self, trouble: str) -> None:
        if trouble != self._trouble:
            say(trouble or f"the audit log {self._path} can be written again")
        self._trouble = trouble


def _open(path: Path, flags: int) -> int:
    """A plain file that only this user can write. Raises OSError, AuditError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return descriptor
    os.close(descriptor)
    raise AuditError(f"the audit log {path} is not a plain file that only this user can write")


def _tail(descriptor: int) -> tuple[bytes, bool]:
    """The end of a file, at least its last line; and whether it is all of the file."""
    start = max(0, os.fstat(descriptor).st_size - _TAIL)
    return os.pread(descriptor, _TAIL, start), start == 0


def _last(tail: bytes, *, whole: bool) -> AuditHead | None:
    """The last line of the chain."""
    for line in reversed(tail.split(b"\n")[0 if whole else 1 : -1]):
        try:
            link = msgspec.json.decode(line, type=_Link)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue  # ended by a newline after a failed write
        return AuditHead(sequence=link.sequence, hash=digest(line))
    return None


def digest(line: bytes) -> str:
    """The hash by which the next line holds on to this one (without its newline)."""
    return str(sha256(line).hexdigest())
