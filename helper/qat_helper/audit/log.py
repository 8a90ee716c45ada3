"""The audit log: one JSON line per event; each line holds the hash of the line before it.

    event     verdict          written
    start     -                when the helper starts
    asked     -                before an operation begins
    refused   denied, busy...  when an operation is not begun, or is found to be forbidden
    done      ok, failed       when an operation ends; `asked` is the sequence number of its first line
    late      late             the same, for an operation whose client was told that it had timed out
    stop      -                when the helper stops (arguments: counters, and operations that have not ended)

main.py writes start, dispatch.py all others: `append` before an operation, which does not begin without its line, and
`enqueue` after it, which is retried.

`previous` is the SHA-256 (hex) of the exact bytes of the line before, without its newline; 64 zeros in the first line.
Each line is written by one write(2). If a write fails part way, the fragment stays in the file. The next write ends it
with "#torn" and a newline, so that it can never be a valid line. A fragment is not part of the chain: the next line's
`previous` and `sequence` skip it, and its `torn` records that it is there. Text from clients is escaped twice (Python's
unicode_escape, then JSON), so it can neither end a line nor change how a line is displayed.

A full file is renamed after its last line's number (audit.jsonl.000000001234) and the chain continues in a new file. If
the helper is killed between any two steps of a rotation, the next helper finds the end of the chain. No file is ever
removed.
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

from qat_helper.console import log
from qat_shared.messages import AuditHead

# hashlib would load OpenSSL into this root process: 3 MiB of code for one hash that Python has built in.
try:
    from _sha2 import sha256  # type: ignore[import-not-found,unused-ignore]  # Python 3.12 and later
except ImportError:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        from hashlib import sha256

_FIRST: Final = "0" * 64
LINE_LIMIT: Final = 16 * 1024
"""No line is longer, in bytes without its newline."""
_TAIL: Final = 4 * LINE_LIMIT  # enough to hold one whole line
_TEXT_LIMIT: Final = 300  # characters of one text, after escaping
_ATTEMPTS: Final = 100
"""Attempts to lock the file, over 2 s: a killed helper's child holds the lock until it closes what it inherited."""


class Sync(StrEnum):
    """When a line is flushed to disk: whenever the kernel does it, or before anything else happens."""

    NEVER = "never"
    LINE = "line"


class AuditError(Exception):
    """The log cannot be written, or the file is not an audit log. The message is one sentence."""


class Caller(Struct, frozen=True):
    """The connected process's credentials when it connected (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


Fields = dict[str, str | int | bool | None]


class Entry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line. Fields that do not apply are left out."""

    sequence: int = 0
    time: str = ""
    event: str
    peer: Caller | None = None
    operation: str = ""
    arguments: Fields = {}
    reason: str = ""
    verdict: str = ""
    result: Fields = {}
    duration_ms: float | None = None
    asked: int = 0
    torn: bool = False
    previous: str = ""


class _Link(Struct):
    """The fields that a line needs for the chain to continue after it."""

    sequence: int
    previous: str


def printable(text: str) -> str:
    """A text from outside as plain ASCII, escaped and truncated."""
    return text.encode("unicode_escape").decode("ascii")[:_TEXT_LIMIT]


class AuditLog:
    """The log at `path`; an existing log is continued. Raises AuditError.

    `clock` returns seconds since 1970. A file holds up to `limit` bytes (0: unlimited). `copy` receives each line.
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
        self._pending: deque[Entry] = deque()
        self._error = ""
        self._actual_path = path  # the path of the open file, which a failed rotation leaves renamed
        try:
            self._descriptor = self._open_locked()
            tail, whole = _tail(self._descriptor)
            # A write that failed may have ended the fragment and got no further.
            self._torn = tail.endswith(b"#torn\n") or (tail != b"" and not tail.endswith(b"\n"))
            head = _last_head(tail, whole=whole)
            if head is None and not (whole and all(line.startswith((b"{", b"#torn")) for line in tail.splitlines())):
                raise AuditError(f"{path} is not an audit log of this helper: move it away")
            self.head = head or self._last_rotated_head()
        except OSError as error:
            hint = f"; create {path.parent}: owner root, mode 0700" * isinstance(error, FileNotFoundError)
            raise AuditError(f"the audit log {path} cannot be opened: {os.strerror(error.errno or 0)}{hint}") from error

    def append(self, entry: Entry) -> int:
        """Write a line and return its sequence number.

        Raises AuditError if it is not in the log or, with Sync.LINE, not on the disk.
        """
        self._write_pending()
        self._write(entry)
        if self._error:
            raise AuditError(self._error)
        return self.head.sequence

    def enqueue(self, entry: Entry) -> None:
        """Write a line about something that has already happened. If that fails, retry before the next line."""
        # The queue stays short: nothing new begins until these lines are written.
        self._pending.append(msgspec.structs.replace(entry, time=self._now()))
        with suppress(AuditError):
            self._write_pending()

    def close(self) -> None:
        """Close the file, so that another helper can write the log."""
        os.close(self._descriptor)

    def _write_pending(self) -> None:
        while self._pending:
            self._write(self._pending[0])
            self._pending.popleft()

    def _open_locked(self, flags: int = 0) -> int:
        """Open the file and lock it exclusively. Raises OSError, AuditError."""
        flags |= os.O_DSYNC if self._sync is Sync.LINE else 0
        descriptor = _open(self._path, flags | os.O_RDWR | os.O_APPEND | os.O_CREAT)
        for _ in range(_ATTEMPTS):
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            time.sleep(0.02)
        os.close(descriptor)
        raise AuditError(f"another helper is writing the audit log {self._path}")

    def _last_rotated_head(self) -> AuditHead:
        """The head of the newest rotated file, or of an empty chain if there is none. Raises OSError, AuditError."""
        full = re.compile(re.escape(self._path.name) + r"\.([0-9]{12,})", re.ASCII)
        numbers = [int(match[1]) for name in os.listdir(self._path.parent) if (match := full.fullmatch(name))]
        if not numbers:
            return AuditHead(sequence=0, hash=_FIRST)
        path = self._rotated_path(max(numbers))
        descriptor = _open(path, os.O_RDONLY)
        tail, whole = _tail(descriptor)
        os.close(descriptor)
        head = _last_head(tail, whole=whole)
        if head is None or head.sequence != max(numbers):
            raise AuditError(f"{path} does not end with the line that its name gives: run qat-helper audit verify")
        return head

    def _rotated_path(self, sequence: int) -> Path:
        """The path of a rotated file whose last line has this sequence number."""
        return self._path.with_name(f"{self._path.name}.{sequence:012d}")

    def _rotate(self) -> None:
        """Rename the full file and start a new one. After OSError or AuditError, call it again."""
        path = self._rotated_path(self.head.sequence)
        if self._actual_path != path:
            if os.path.lexists(path):
                raise OSError(errno.EEXIST, f"{path} already exists: move it away")
            os.rename(self._actual_path, path)
            self._actual_path = path
        descriptor = self._open_locked(os.O_EXCL)
        os.close(self._descriptor)
        self._descriptor, self._actual_path = descriptor, self._path

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
        if len(line) > LINE_LIMIT:  # a bug: no request can make a line this long
            raise AuditError(f"a line of {len(line)} bytes is too long for the audit log: the operation is refused")
        data = b"#torn\n" * self._torn + line + b"\n"
        why, before = "", os.fstat(self._descriptor).st_size
        try:
            self._check_not_moved()
            full = before and 0 < self._limit < before + len(data) and not self._torn
            if full or self._actual_path != self._path:
                self._rotate()
                before = 0
            if os.write(self._descriptor, data) != len(data):
                why = os.strerror(errno.ENOSPC)  # a short write: the next one would fail with this
        except OSError as error:
            why = error.strerror or os.strerror(error.errno or 0)
        # Measured, because with O_DSYNC a write can fail with the whole line in the file but not on the disk.
        written = os.fstat(self._descriptor).st_size - before
        message = f"the audit log {self._path} cannot be written ({why}): audited operations are refused"
        self._log_change(message if why else "")
        if written != len(data):
            self._torn = self._torn or written > 0
            raise AuditError(message)
        self._torn = False
        self.head = AuditHead(sequence=self.head.sequence + 1, hash=digest(line))
        self._copy(line)

    def _check_not_moved(self) -> None:
        """Raises OSError when the open file is no longer at its path, where nobody would see the line."""
        ours, there = os.fstat(self._descriptor), os.stat(self._actual_path, follow_symlinks=False)
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            raise OSError(errno.ESTALE, "it was moved: restart the helper")

    def _now(self) -> str:
        seconds = self._clock()
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"

    def _log_change(self, error: str) -> None:
        if error != self._error:
            log(error or f"the audit log {self._path} can be written again")
        self._error = error


def _open(path: Path, flags: int) -> int:
    """Open a regular file that only this user can write. Raises OSError, AuditError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return descriptor
    os.close(descriptor)
    raise AuditError(f"the audit log {path} is not a regular file that only this user can write")


def _tail(descriptor: int) -> tuple[bytes, bool]:
    """The end of a file, with at least its last line, and whether that is the whole file."""
    start = max(0, os.fstat(descriptor).st_size - _TAIL)
    return os.pread(descriptor, _TAIL, start), start == 0


def _last_head(tail: bytes, *, whole: bool) -> AuditHead | None:
    """The head that the last line of the chain makes; None when there is no such line."""
    for line in reversed(tail.split(b"\n")[0 if whole else 1 : -1]):
        try:
            link = msgspec.json.decode(line, type=_Link)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue  # a fragment of a failed write, ended with a newline
        return AuditHead(sequence=link.sequence, hash=digest(line))
    return None


def digest(line: bytes) -> str:
    """The SHA-256 of a line without its newline, which the next line stores as `previous`."""
    return str(sha256(line).hexdigest())
