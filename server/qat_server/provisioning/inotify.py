"""Names that are created, written and deleted in watched directories (inotify(7))."""

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

_CLOSE_WRITE: Final = 0x8
_MOVED_TO: Final = 0x80
_CREATE: Final = 0x100
_DELETE: Final = 0x200
_IGNORED: Final = 0x8000
_ONLYDIR: Final = 0x01000000
_HEADER: Final = struct.Struct("iIII")  # wd, mask, cookie, length of the name


class Inotify:
    """Calls `created`, `deleted` and `written` in the running loop until closed. Renaming a name away calls none.

    Raises OSError where no inotify instance is available (most systems allow 128 per user).
    """

    def __init__(
        self,
        created: Callable[[Path], None],
        deleted: Callable[[Path], None],
        written: Callable[[Path], None] | None = None,
    ) -> None:
        self._created = created
        self._written = written
        self._deleted = deleted
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._directories: dict[int, Path] = {}
        self._descriptor = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._read)

    def add(self, directory: Path) -> None:
        """Also watch this directory; adding one again has no effect. Raises OSError."""
        mask = _CREATE | _MOVED_TO | _DELETE | _ONLYDIR | (_CLOSE_WRITE if self._written else 0)
        found = self._libc.inotify_add_watch(self._descriptor, os.fsencode(directory), ctypes.c_uint32(mask))
        self._directories[self._checked(found, str(directory))] = directory

    def close(self) -> None:
        """Stop watching."""
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _checked(self, result: int, what: str) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), what)
        return result

    def _read(self) -> None:
        events = os.read(self._descriptor, 64 * 1024)
        position = 0
        while position < len(events):
            watch, mask, _, length = _HEADER.unpack_from(events, position)
            position += _HEADER.size
            name = os.fsdecode(events[position : position + length].rstrip(b"\0"))
            position += length
            directory = self._directories.get(watch)
            if mask & _IGNORED:  # the directory is gone
                self._directories.pop(watch, None)
            elif directory is not None and mask & (_CREATE | _MOVED_TO):
                self._created(directory / name)
            elif directory is not None and mask & _DELETE:
                self._deleted(directory / name)
            elif directory is not None and mask & _CLOSE_WRITE and self._written is not None:
                self._written(directory / name)
