"""The files of an audit log, opened once and read as they were then, while a helper may write and rotate the log.

A file is only appended to, so its content up to the size that it had when it was opened does not change. An open file
stays the same file when a rotation renames it.
"""

import os
import re
import stat
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from qat_helper.audit.log import AuditError

_ROTATED: Final = re.compile(r"\.[0-9]{12,}", re.ASCII)
_CHUNK: Final = 64 * 1024
_ATTEMPTS: Final = 50
_PAUSE: Final = 0.02
"""Seconds between attempts to open the log: a rotation renames the current file before it creates the next one."""


class LogFile:
    """One open file. Iterating yields its bytes in chunks, from the beginning each time. Raises AuditError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from error
        self.close = weakref.finalize(self, os.close, self._descriptor)
        """Close the file; otherwise it is closed when nothing refers to it."""
        status = os.fstat(self._descriptor)
        self.identity = (status.st_dev, status.st_ino)
        self._size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            kind = "a directory: name the files in it" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise AuditError(f"{path} is {kind}")

    def __iter__(self) -> Iterator[bytes]:
        position = 0
        while position < self._size:
            try:
                chunk = os.pread(self._descriptor, min(_CHUNK, self._size - position), position)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if not chunk:
                raise AuditError(f"{self.path} became shorter while it was read")
            position += len(chunk)
            yield chunk


def open_files(paths: Sequence[Path]) -> dict[str, LogFile]:
    """Open files by name. Raises AuditError."""
    return {str(path): LogFile(path) for path in dict.fromkeys(paths)}


def open_log(path: Path) -> dict[str, LogFile]:
    """Open the log at `path` and its rotated files, by name. Raises AuditError.

    A listing may miss files that are renamed meanwhile. So it counts only if the current file was not rotated since
    it was opened.
    """
    for _ in range(_ATTEMPTS):
        try:
            current = LogFile(path)
        except AuditError as error:
            if not (isinstance(error.__cause__, FileNotFoundError) and _rotated(path)):
                raise
        else:
            older = _rotated(path)
            if _identity(path) == current.identity:
                return open_files(older) | {str(path): current}
            current.close()
        time.sleep(_PAUSE)
    LogFile(path).close()  # raises if the file is missing still
    raise AuditError(f"{path} was rotated each time that it was opened: try again")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _rotated(path: Path) -> list[Path]:
    return sorted(each for each in path.parent.glob(f"{path.name}.*") if _ROTATED.fullmatch(each.suffix))


def _unreadable(path: Path, error: OSError) -> AuditError:
    return AuditError(f"{path} cannot be read: {os.strerror(error.errno or 0)}")
