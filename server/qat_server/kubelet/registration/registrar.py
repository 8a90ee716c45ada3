"""How the kubelet learns of an endpoint: the interface that both ways to register have in common.

kubelet_socket.py calls the kubelet, plugin_watcher.py waits for the kubelet's call. Each has one `Registrar`, made for
one resource. endpoint.py decides when to register, and what to do after a failure or the end of a stream.
"""

from pathlib import Path
from typing import Final, Protocol

import grpc.aio
from msgspec import Struct

from qat_server.kubelet.watch_streams import WatchStreams

VERSION: Final = "v1beta1"


class Timing(Struct, frozen=True):
    """The waits of an endpoint and its registration, in seconds. Those of the sockets are in sockets/."""

    first_pause: float = 0.05  # doubles with each further pause
    after_failure: float = 1.0  # the longest pause after a failed registration
    after_stream: float = 0.4  # the longest pause after a short stream; a kubelet that restarts often must not wait
    settled: float = 1.0  # a stream that lived this long did not end because of us: no pause is needed
    # Until the kubelet opens the stream. It takes milliseconds; the timeout doubles, since the kubelet may be busy.
    stream_first: float = 1.0
    stream_last: float = 10.0
    # Before the socket is recreated: a kubelet that restarts or reconnects without our help takes milliseconds.
    reconnect: float = 0.1
    kubelet_wait: float = 10.0  # how long the helper waits for the kubelet's socket in one request
    # Until the kubelet has found a new socket: its watcher takes a second, its dial ten. A kubelet that is down finds
    # the socket when it starts, so this timeout only repairs a lost notification.
    discovery: float = 30.0


class CannotRegisterError(Exception):
    """One attempt to register has failed; the message is one sentence with the reason."""


class Registrar(Protocol):
    """Registers one resource with the kubelet."""

    @property
    def socket_path(self) -> Path:
        """The path to serve the endpoint at."""

    async def needs_new_socket(self, streams: WatchStreams) -> bool:
        """Whether the kubelet registers only if the socket is recreated. The old socket is still being served."""

    def add_services(self, server: grpc.aio.Server) -> None:
        """Add the services that the kubelet calls on the endpoint's socket in addition to DevicePlugin."""

    async def register(self, streams: WatchStreams) -> None:
        """Return when the kubelet has registered the endpoint, which is being served. Raises CannotRegisterError."""
