"""PrepareSocketDirectory and OpenPodResources: limited access to the kubelet's root-only directory.

<kubelet dir>/device-plugins/qat.intel.com     created, with the server's group, for the server's endpoints
<kubelet dir>/plugins_registry/qat.intel.com   the same, for the kubelet's plugin watcher
<kubelet dir>/pod-resources/kubelet.sock       connected to; the connection is passed to the server
<kubelet dir>/device-plugins/kubelet.sock      connected to, for registration.py
"""

import errno
import os
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from qat_helper.errors import PENDING_HEAD, OperationError
from qat_helper.operations.node import Node, Outcome
from qat_shared import NAMESPACE
from qat_shared.messages import Connected, Done, ErrorCode, OpenPodResources, PrepareSocketDirectory, SocketDirectory

MODE: Final = 0o770
UMASK: Final = 0o007
"""The process's umask while it serves: mkdir then makes the mode, since the sandbox allows no chmod."""
DEVICE_PLUGINS: Final = "device-plugins"
_DIRECTORIES: Final = {
    SocketDirectory.DEVICE_PLUGINS: DEVICE_PLUGINS,
    SocketDirectory.PLUGINS_REGISTRY: "plugins_registry",
}
_SOCKET: Final = "kubelet.sock"
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RETRY: Final = 0.005  # the kubelet re-admits pods from before a reboot a few milliseconds after it starts to listen
_NO_SOCKET: Final = frozenset({errno.ENOENT, errno.ENOTDIR})
_NOT_THERE: Final = _NO_SOCKET | {errno.ECONNREFUSED, errno.EAGAIN}


def open_unprepared(kubelet_dir: Path, directory: SocketDirectory, gid: int) -> int | None:
    """A descriptor of an existing endpoint directory whose group or mode is not as it should be; else None.

    The kubelet makes it root's, 0755, for a volume of the type DirectoryOrCreate.
    """
    with suppress(OSError):  # the operation that needs it reports that
        descriptor = os.open(kubelet_dir / _DIRECTORIES[directory] / NAMESPACE, _FLAGS)
        if not _is_prepared(descriptor, gid):
            return descriptor
        os.close(descriptor)
    return None


def repair(descriptor: int, gid: int) -> None:
    """Give an endpoint directory its group and mode, before the sandbox forbids chmod and chown. Raises OSError."""
    os.fchown(descriptor, -1, gid)
    os.fchmod(descriptor, MODE)


def _is_prepared(descriptor: int, gid: int) -> bool:
    status = os.fstat(descriptor)
    return (status.st_gid, stat.S_IMODE(status.st_mode)) == (gid, MODE)


def prepare_socket_directory(node: Node, request: PrepareSocketDirectory) -> Outcome:
    """Create the endpoint directory, or check an existing one's group and mode. Raises OperationError."""
    folder = node.kubelet_dir / _DIRECTORIES[request.directory]
    try:
        parent = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise OperationError(
            ErrorCode.UNAVAILABLE, f"{folder} cannot be opened ({why}): does the kubelet use another root directory?"
        ) from error
    try:
        _create(parent, node.server_gid)
    except OSError as error:
        number = error.errno or 0
        raise OperationError(
            ErrorCode.KERNEL,
            f"cannot create the directory {folder / NAMESPACE} with group {node.server_gid} ({os.strerror(number)}): "
            "remove anything else at that path, run the helper as root in that group, and restart it if the kubelet's "
            "directory was recreated or if this directory has another group or mode",
            number,
        ) from error
    finally:
        os.close(parent)
    return Outcome(Done(id=request.id, audit=PENDING_HEAD))


def _create(parent: int, gid: int) -> None:
    with suppress(FileExistsError):
        os.mkdir(NAMESPACE, MODE, dir_fd=parent)  # its group is the process's, the server's
    directory = os.open(NAMESPACE, _FLAGS, dir_fd=parent)
    try:
        if not _is_prepared(directory, gid):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    finally:
        os.close(directory)


def open_pod_resources(node: Node, request: OpenPodResources) -> Outcome:
    """Connect to the kubelet's PodResources socket. Raises OperationError."""
    folder = node.kubelet_dir / "pod-resources"
    try:
        return Outcome(Connected(id=request.id, audit=PENDING_HEAD), connect(folder, request.wait_ms))
    except OperationError as error:
        # A socket that refuses connections was left by a kubelet that had the service. Without a socket, either no
        # kubelet is running or it has no such service; whether it listens for registrations tells which.
        if error.errno not in _NO_SOCKET:
            raise
        with suppress(OSError):
            os.close(_connect(os.fspath(node.kubelet_dir / DEVICE_PLUGINS)))
            why = f"the kubelet is running, but there is no {folder / _SOCKET}"
            raise OperationError(ErrorCode.UNSUPPORTED, why, error.errno) from error
        raise


def connect(folder: Path, wait_ms: int) -> int:
    """A connection to kubelet.sock in `folder`, waiting up to `wait_ms` for it. Raises OperationError."""
    deadline = time.monotonic() + wait_ms / 1000
    parent = os.getppid()
    while True:
        try:
            return _connect(os.fspath(folder))
        except OSError as error:
            number = error.errno or 0
            if number not in _NOT_THERE:
                raise OperationError(
                    ErrorCode.KERNEL, f"cannot connect to {folder / _SOCKET}: {os.strerror(number)}", number
                ) from error
        # A child whose parent has exited stops waiting.
        if time.monotonic() + _RETRY > deadline or os.getppid() != parent:
            raise OperationError(
                ErrorCode.UNAVAILABLE, f"the kubelet is not listening on {folder / _SOCKET}: is it running?", number
            )
        time.sleep(_RETRY)


def _connect(folder: str) -> int:
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)  # with a full backlog, connect would block
            # By descriptor: a socket path is limited to 107 bytes.
            connection.connect(f"/proc/self/fd/{directory}/{_SOCKET}")
            connection.setblocking(True)
            return connection.detach()
    finally:
        os.close(directory)
