"""PrepareSocketDirectory and OpenKubeletSocket: the kubelet's directory belongs to root; these two open it a crack.

<kubelet dir>/device-plugins/qat.intel.com     made the server's group's, so that it can serve endpoints there
<kubelet dir>/plugins_registry/qat.intel.com   the same, for the kubelet's plugin watcher
<kubelet dir>/device-plugins/kubelet.sock      connected to, and the connection passed to the server
<kubelet dir>/pod-resources/kubelet.sock       the same
"""

import errno
import os
import socket
import stat
import time
from contextlib import suppress
from typing import Final

from qat_helper.errors import UNSIGNED, OperationError
from qat_helper.node import Node, Outcome
from qat_shared import NAMESPACE
from qat_shared.messages import (
    Connected,
    Done,
    ErrorCode,
    KubeletService,
    OpenKubeletSocket,
    PrepareSocketDirectory,
    SocketDirectory,
)

MODE: Final = 0o2770
_PARENTS: Final = {
    SocketDirectory.DEVICE_PLUGINS: "device-plugins",
    SocketDirectory.PLUGINS_REGISTRY: "plugins_registry",
}
_FOLDERS: Final = {KubeletService.REGISTRATION: "device-plugins", KubeletService.POD_RESOURCES: "pod-resources"}
_SOCKET: Final = "kubelet.sock"
_RETRY: Final = 0.005  # the kubelet admits pods from before a reboot some milliseconds after it has begun to listen
_NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED, errno.EAGAIN})


def prepare_socket_directory(node: Node, request: PrepareSocketDirectory) -> Outcome:
    """Make the endpoints' directory, or repair its group and mode. Raises OperationError."""
    folder = node.kubelet_dir / _PARENTS[request.directory]
    try:
        parent = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise OperationError(
            ErrorCode.UNAVAILABLE, f"{folder} cannot be opened ({why}): is the kubelet's directory another one?"
        ) from error
    try:
        _prepare(parent, node.server_gid)
    except OSError as error:
        number = error.errno or 0
        raise OperationError(
            ErrorCode.KERNEL,
            f"{folder / NAMESPACE} cannot be made a directory of group {node.server_gid} ({os.strerror(number)}): "
            "remove what is there, run the helper as root in that group, and start it again if the kubelet's directory "
            "was made anew",
            number,
        ) from error
    finally:
        os.close(parent)
    return Outcome(Done(id=request.id, audit=UNSIGNED))


def _prepare(parent: int, gid: int) -> None:
    with suppress(FileExistsError):
        os.mkdir(NAMESPACE, 0o700, dir_fd=parent)
    directory = os.open(NAMESPACE, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if os.fstat(directory).st_gid != gid:
            os.fchown(directory, -1, gid)
        if stat.S_IMODE(os.fstat(directory).st_mode) != MODE:
            os.fchmod(directory, MODE)
        if stat.S_IMODE(os.fstat(directory).st_mode) != MODE:  # the setgid bit is dropped without an error
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    finally:
        os.close(directory)


def open_kubelet_socket(node: Node, request: OpenKubeletSocket) -> Outcome:
    """Connect to the kubelet, waiting for it if asked to. Raises OperationError."""
    folder = node.kubelet_dir / _FOLDERS[request.service]
    deadline = time.monotonic() + request.wait_ms / 1000
    parent = os.getppid()
    while True:
        try:
            return Outcome(Connected(id=request.id, audit=UNSIGNED), _connect(os.fspath(folder)))
        except OSError as error:
            number = error.errno or 0
            if number not in _NOT_THERE:
                raise OperationError(
                    ErrorCode.KERNEL, f"{folder / _SOCKET} cannot be connected to: {os.strerror(number)}", number
                ) from error
        # Without its parent, a child has nobody to wait for.
        if time.monotonic() + _RETRY > deadline or os.getppid() != parent:
            raise OperationError(
                ErrorCode.UNAVAILABLE, f"the kubelet does not listen on {folder / _SOCKET}: is it running?", number
            )
        time.sleep(_RETRY)


def _connect(folder: str) -> int:
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)  # a full backlog would make connect wait
            # Through the descriptor, since a socket's path has 107 bytes at most.
            connection.connect(f"/proc/self/fd/{directory}/{_SOCKET}")
            connection.setblocking(True)
            return connection.detach()
    finally:
        os.close(directory)
