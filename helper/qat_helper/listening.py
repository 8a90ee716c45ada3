"""The helper's socket, accessible to root and the server's group; removed at the end if it is still ours.

With systemd socket activation, the socket unit sets the path, group and mode, and the socket outlives this process.
"""

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from qat_shared import SUN_PATH_LIMIT

_BACKLOG: Final = 16
SO_PASSRIGHTS: Final = 83
"""Whether peers may send descriptors (asm-generic/socket.h). Accepted connections inherit the listener's value."""
FIRST_PASSED: Final = 3  # after the standard ones; SD_LISTEN_FDS_START of sd_listen_fds(3)


class ListenError(Exception):
    """The socket cannot be created. The message is one sentence."""


@contextmanager
def listening(path: Path, gid: int) -> Iterator[socket.socket]:
    """A non-blocking SEQPACKET socket of mode 0660 and group `gid`, or the one from systemd. Raises ListenError."""
    if (inherited := _inherited()) is not None:
        with inherited:
            _prepare(inherited)
            yield inherited
        return
    if len(os.fsencode(path)) > SUN_PATH_LIMIT:
        raise ListenError(f"the socket path is longer than {SUN_PATH_LIMIT} bytes: {path}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        _prepare(listener)
        try:
            _remove_stale(path)
            _bind(listener, path, gid)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            hint = f"; create {path.parent}: owner root, the server's group, mode 0750" if missing else ""
            raise ListenError(f"cannot listen on {path}: {os.strerror(error.errno or 0)}{hint}") from error
        ours = _identity(path)
        try:
            yield listener
        finally:
            with suppress(OSError):
                if _identity(path) == ours:
                    path.unlink()


def _inherited() -> socket.socket | None:
    """The socket passed by systemd (sd_listen_fds(3)), or None without socket activation. Raises ListenError."""
    pid, number = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    if pid != str(os.getpid()):
        return None
    with suppress(OSError):  # not a socket, or not a listening one
        listener = socket.socket(fileno=FIRST_PASSED)  # detects the family and type
        is_ours = (listener.family, listener.type, number) == (socket.AF_UNIX, socket.SOCK_SEQPACKET, "1")
        if is_ours and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.set_inheritable(False)
            return listener
    raise ListenError("systemd must pass one listening socket: use ListenSequentialPacket= and Accept=no")


def _prepare(listener: socket.socket) -> None:
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # marks even an empty packet with credentials
    with suppress(OSError):  # before Linux 6.16; serve.py works without it
        listener.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


def _bind(listener: socket.socket, path: Path, gid: int) -> None:
    before = os.umask(0o117)
    try:
        listener.bind(os.fspath(path))
    finally:
        os.umask(before)
    try:
        if path.lstat().st_gid != gid:
            os.chown(path, -1, gid, follow_symlinks=False)
        listener.listen(_BACKLOG)
    except OSError as error:
        path.unlink()
        if error.errno == errno.EPERM:
            raise ListenError(f"cannot change the group of {path} to {gid}: run the helper in that group") from error
        raise


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path} exists and is not a socket: remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as trial:
        trial.setblocking(False)
        try:
            trial.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()  # left behind by a helper that was killed
            return
        except OSError:
            pass  # a full backlog or another socket type: some process is listening
    raise ListenError(f"another process is listening on {path}: stop it, or choose another path")


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
