"""Socket files: made under a temporary name and renamed into place, known by their inode, removed by their maker."""

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

_TEMPORARY: Final = ".qat-"
"""Prefix of temporary names, which mean nothing to any other process."""


class BoundSocket(Struct, frozen=True):
    """A socket file that this process has made: its path, and the device and inode that identify it."""

    path: Path
    device: int
    inode: int

    def exists(self) -> bool:
        """Whether the path still leads to this socket."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (self.device, self.inode)

    def remove(self) -> None:
        """Remove the socket, unless another process has replaced it."""
        if self.exists():
            with contextlib.suppress(OSError):  # the directory may have been removed too
                os.unlink(self.path)


@contextlib.contextmanager
def short_path(directory: Path) -> Iterator[str]:
    """A path of `directory` in this process, short enough for a socket path (107 bytes in all). Raises OSError."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_path(directory: Path) -> Iterator[str]:
    """A path in `directory` to bind a socket to, for `move_into_place`. Removed if the block fails. Raises OSError."""
    with short_path(directory) as parent:
        path = f"{parent}/{_TEMPORARY}{secrets.token_hex(4)}"
        try:
            yield path
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise


def move_into_place(temporary: str, path: Path) -> BoundSocket:
    """Rename a socket from its temporary path to `path`, in the same directory. Raises OSError."""
    found = os.lstat(temporary)
    os.rename(temporary, f"{os.path.dirname(temporary)}/{path.name}")
    return BoundSocket(path, found.st_dev, found.st_ino)


@contextlib.contextmanager
def temporary_directory(directory: Path) -> Iterator[Path]:
    """A new 0700 directory in `directory`, removed at the end. Raises OSError."""
    made = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=directory))
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(made)


def remove_leftovers(directory: Path) -> None:
    """Remove the sockets and temporary files of a killed process. No other process may be using `directory`."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if not (entry.name.startswith(_TEMPORARY) or _is_socket(entry)):
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    for inner in os.listdir(entry.path):
                        os.unlink(f"{entry.path}/{inner}")
                    os.rmdir(entry.path)
                else:
                    os.unlink(entry.path)


def _is_socket(entry: "os.DirEntry[str]") -> bool:
    try:
        return stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)
    except OSError:
        return False
