"""A gRPC server at a path: bound to a temporary name and then renamed, so that the path is always a usable socket.

gRPC unlinks the path that it was bound to, at some time after the server has stopped. With the final path, a server
that exits could remove the socket of the next one; after the rename there is nothing for it to remove. The rename also
replaces a stale socket in one step, and no client can connect before the mode is set.
"""

import asyncio
import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grpc.aio
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


async def start(server: grpc.aio.Server, path: Path, mode: int) -> BoundSocket:
    """Start `server` at `path`, replacing any socket that was there. Raises OSError."""
    with temporary_path(path.parent) as temporary:
        try:
            server.add_insecure_port(f"unix:{temporary}")
        except RuntimeError as error:  # gRPC does not pass the errno on
            writable = os.access(os.path.dirname(temporary), os.W_OK | os.X_OK)
            why = str(error) if writable else "no write permission"
            raise OSError(f"cannot make a socket in {path.parent}: {why}") from error
        os.chmod(temporary, mode)
        await server.start()
        return move_into_place(temporary, path)


async def stop(server: grpc.aio.Server, grace: float) -> None:
    """Stop `server`; RPCs in progress get `grace` seconds to finish.

    gRPC waits with asyncio.wait_for, which before Python 3.12 loses a cancellation that arrives as the wait ends.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    await server.stop(grace)
    if task and task.cancelling() > before:
        raise asyncio.CancelledError


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
