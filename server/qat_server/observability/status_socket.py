"""The local socket on which a running server tells its status: beside its endpoints, where it may write.

The name begins with a dot: the kubelet's plugin watcher passes over such names, and its device manager looks at no
subdirectory. The directory is root's and the server's group's, so nobody else can ask.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qat_server.kubelet.sockets.grpc_socket import move_into_place, temporary_path
from qat_server.observability.status import STATUS_SOCKET

_BACKLOG: Final = 16
_MODE: Final = 0o660


@contextlib.contextmanager
def listening(directory: Path) -> Iterator[socket.socket]:
    """A socket that listens at `directory`/STATUS_SOCKET, in place of one that was left there. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with temporary_path(directory) as temporary:
            listener.bind(temporary)
            os.chmod(temporary, _MODE)
            listener.listen(_BACKLOG)
            bound = move_into_place(temporary, directory / STATUS_SOCKET)
        try:
            yield listener
        finally:
            bound.remove()
