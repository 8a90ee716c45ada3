"""Notifies the service manager (systemd) of the start and the end: datagrams to the socket named in NOTIFY_SOCKET.

The protocol is sd_notify(3): lines of NAME=VALUE, one datagram, no answer. The socket is connected before the process
enters the sandbox, which allows no connection to outside paths or abstract names; a connected socket may still send.
The existing libraries cannot be used: they connect whenever they send, or need libsystemd.
"""

import asyncio
import socket
from collections.abc import MutableMapping
from typing import Final, Self

from qat_server import logs

log = logs.get(__name__)

VARIABLE: Final = "NOTIFY_SOCKET"
_MAX_STATUS: Final = 1000
"""Characters in a status. The whole datagram may have 4096 bytes (systemd's NOTIFY_BUFFER_MAX)."""


class ServiceManager:
    """One connected socket. A notification that cannot be sent is only logged: the manager has its own timeout."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> Self | None:
        """Connect to the manager that started this process; None without one. Removes VARIABLE from `environment`."""
        address = environment.pop(VARIABLE, "")
        if not address:
            return None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        except OSError as error:
            sock.close()
            log.warning(
                "service manager cannot be reached: it ends this process after TimeoutStartSec=",
                socket=address,
                why=error.strerror or str(error),
            )
            return None
        return cls(sock)

    async def ready(self, status: str) -> None:
        """Notify that the start is complete, with a status for people. Waits while the socket's queue is full."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, _packet("READY=1", status))
        except OSError as error:
            log.warning("service manager cannot be notified", why=error.strerror or str(error))

    def stopping(self) -> None:
        """Notify that the process is stopping. Not sent if the socket's queue is full, since nothing depends on it."""
        try:
            self._sock.send(_packet("STOPPING=1", "stopping"))
        except OSError as error:
            log.v(1, "service manager cannot be notified", why=error.strerror or str(error))

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def _packet(state: str, status: str) -> bytes:
    line = " ".join(status.split())
    if len(line) > _MAX_STATUS:
        line = f"{line[: _MAX_STATUS - 3]}..."
    return f"{state}\nSTATUS={line}\n".encode(errors="replace")
