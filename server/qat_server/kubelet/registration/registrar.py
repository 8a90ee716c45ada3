"""How the kubelet learns of an endpoint: what the endpoint knows of it, whichever of the two ways it is.

registration_socket.py tells the kubelet, registration_watcher.py waits to be found. Each is one `Registrar`, made for
one resource; endpoint.py decides when, and what to do after a failure or the end of a stream.
"""

from pathlib import Path
from typing import Final, Protocol

import grpc.aio
from msgspec import Struct

from qat_server.kubelet.watch_streams import WatchStreams

VERSION: Final = "v1beta1"


class Timing(Struct, frozen=True):
    """All waits, in seconds. A pause begins with `first` and doubles."""

    first: float = 0.05
    after_failure: float = 1.0  # the longest pause after a registration failed
    after_stream: float = 0.4  # ... after a stream that ended too soon: a kubelet restarting often must be kept up with
    settled: float = 1.0  # a stream that lived so long ended for a reason of its own, and no pause is made
    register: float = 12.0  # for Register's answer: the kubelet gives up on its call back after ten
    stream_first: float = (
        1.0  # until the kubelet opens the stream (it takes milliseconds); doubles, since it may be busy
    )
    stream_last: float = 10.0
    # Before a socket is made anew: a kubelet that restarts, or registers all over again by itself, takes milliseconds.
    by_itself: float = 0.1
    kubelet: float = 10.0  # that the helper waits for the kubelet's socket in one request
    # Until the kubelet has found a new socket, by itself: its watcher takes a second, its dial ten. A kubelet that is
    # down finds the socket when it starts, so this only mends what was lost.
    found: float = 30.0


class CannotRegisterError(Exception):
    """One attempt failed; the text says why, in one sentence."""


class Registrar(Protocol):
    """One resource's way to the kubelet."""

    @property
    def socket_path(self) -> Path:
        """Where the endpoint is to be served."""

    async def needs_new_socket(self, streams: WatchStreams) -> bool:
        """Whether only a new socket makes the kubelet register; the old one is being served meanwhile."""

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add what the kubelet asks on the endpoint's socket beside the DevicePlugin service."""

    async def register(self, streams: WatchStreams) -> None:
        """Return when the kubelet knows of the endpoint, which is being served. Raises CannotRegisterError."""
