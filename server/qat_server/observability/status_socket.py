"""The local status socket of a running server, next to its endpoints' sockets, where the server may create files.

Its name begins with a dot because the kubelet's plugin watcher ignores such names; its device manager does not read
subdirectories. Only root and the server's group have access to the directory, so nobody else can connect.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qat_server.kubelet.sockets.grpc_socket import private_name, put
from qat_server.observability.status import STATUS_SOCKET

_BACKLOG: Final = 16
_MODE: Final = 0o660


@contextlib.contextmanager
def listening(directory: Path) -> Iterator[socket.socket]:
    """A socket that listens at `directory`/STATUS_SOCKET and replaces a stale one. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with private_name(directory) as private:
            listener.bind(private)
            os.chmod(private, _MODE)
            listener.listen(_BACKLOG)
            bound = put(private, directory / STATUS_SOCKET)
        try:
            yield listener
        finally:
            bound.remove()
