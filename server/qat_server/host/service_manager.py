"""What the service manager (systemd) is told of this process: datagrams to the socket that it names in NOTIFY_SOCKET.

The protocol is sd_notify(3): lines of NAME=VALUE, one datagram, no answer. The socket is connected before the sandbox,
in which neither a path outside nor an abstract name can be reached any more, and kept: a connected one may send. Own
lines rather than a library: those that there are connect when they please, or need libsystemd.
"""

import asyncio
import socket
from collections.abc import MutableMapping
from typing import Final, Self

from qat_server import logs

log = logs.get(__name__)

VARIABLE: Final = "NOTIFY_SOCKET"
_MOST: Final = 1000
"""Characters of a status. The whole datagram may have 4096 bytes (systemd's NOTIFY_BUFFER_MAX)."""


class ServiceManager:
    """One connected socket. What cannot be sent is logged: whoever waits for it has a time-out of his own."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> Self | None:
        """The one that started this process, None without one. Takes the variable out of the environment."""
        place = environment.pop(VARIABLE, "")
        if not place:
            return None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(f"\0{place[1:]}" if place.startswith("@") else place)
        except OSError as error:
            sock.close()
            log.warning(
                "service manager cannot be reached: it will end this process when its TimeoutStartSec= is over",
                socket=place,
                why=error.strerror or str(error),
            )
            return None
        return cls(sock)

    async def ready(self, status: str) -> None:
        """The start is done; `status` is for people. Waits while the manager is too busy to take it."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, _packet("READY=1", status))
        except OSError as error:
            log.warning("service manager cannot be told", why=error.strerror or str(error))

    def stopping(self) -> None:
        """The end has begun. Nothing depends on it: not sent when it would have to wait."""
        try:
            self._sock.send(_packet("STOPPING=1", "stopping"))
        except OSError as error:
            log.v(1, "service manager cannot be told", why=error.strerror or str(error))

    def close(self) -> None:
        """Tell nothing more."""
        self._sock.close()


def _packet(state: str, status: str) -> bytes:
    line = " ".join(status.split())
    if len(line) > _MOST:
        line = f"{line[: _MOST - 3]}..."
    return f"{state}\nSTATUS={line}\n".encode(errors="replace")
