"""A gRPC server at a path: bound under a private name, then renamed, so that the path is never half-made nor lost.

gRPC unlinks the path that it was bound to, at some time after the server has stopped. If that were the real path, the
end of one server could remove the socket of the next. With the rename it finds nothing to remove; a stale socket is
replaced in one step; and nobody can connect before the mode is right.
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

_PRIVATE: Final = ".qat-"
"""How the names begin that only the process knows which has made them."""


class BoundSocket(Struct, frozen=True):
    """A socket file that is ours: its path, and the inode by which it is known."""

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
        """Remove it; a socket that another has put in its place stays."""
        if self.exists():
            with contextlib.suppress(OSError):  # the directory may have gone too
                os.unlink(self.path)


@contextlib.contextmanager
def short(directory: Path) -> Iterator[str]:
    """A name of `directory` for this process that leaves room for a socket's (107 bytes in all). Raises OSError."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def private_name(directory: Path) -> Iterator[str]:
    """A path to bind a socket of `directory` to, removed if the block fails; else to be `put`. Raises OSError."""
    with short(directory) as here:
        private = f"{here}/{_PRIVATE}{secrets.token_hex(4)}"
        try:
            yield private
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(private)
            raise


def put(private: str, path: Path) -> BoundSocket:
    """Move a socket from its private name to `path`, in the same directory. Raises OSError."""
    found = os.lstat(private)
    os.rename(private, f"{os.path.dirname(private)}/{path.name}")
    return BoundSocket(path, found.st_dev, found.st_ino)


async def start(server: grpc.aio.Server, path: Path, mode: int) -> BoundSocket:
    """Start `server` at `path`, in place of whatever socket was there. Raises OSError."""
    with private_name(path.parent) as private:
        try:
            server.add_insecure_port(f"unix:{private}")
        except RuntimeError as error:  # gRPC keeps the errno to itself
            why = "no write permission" if not os.access(os.path.dirname(private), os.W_OK | os.X_OK) else str(error)
            raise OSError(f"cannot make a socket in {path.parent}: {why}") from error
        os.chmod(private, mode)
        await server.start()
        return put(private, path)


async def stop(server: grpc.aio.Server, grace: float) -> None:
    """Stop `server`; answers under way are given `grace` seconds.

    gRPC waits with asyncio.wait_for, which before Python 3.12 loses a cancellation that comes when the wait is over.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    await server.stop(grace)
    if task and task.cancelling() > before:
        raise asyncio.CancelledError


@contextlib.contextmanager
def private_directory(directory: Path) -> Iterator[Path]:
    """A fresh 0700 directory in `directory`, removed at the end. Raises OSError."""
    made = Path(tempfile.mkdtemp(prefix=_PRIVATE, dir=directory))
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(made)


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process left, its sockets too: only where no other process works in `directory`."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if not (entry.name.startswith(_PRIVATE) or _is_socket(entry)):
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
