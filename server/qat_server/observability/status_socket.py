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

from qat_server.kubelet.sockets.socket_files import move_into_place, temporary_path
from qat_server.observability.status_format import STATUS_SOCKET

_BACKLOG: Final = 16
_MODE: Final = 0o660


@contextlib.contextmanager
def listening(directory: Path) -> Iterator[socket.socket]:
    """A socket that listens at `directory`/STATUS_SOCKET and replaces a stale one. Raises OSError."""
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
