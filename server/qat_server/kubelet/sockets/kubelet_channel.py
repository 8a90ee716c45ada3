"""gRPC to the kubelet over a socket that the helper connected: grpcio cannot take a descriptor, so bytes are relayed.

Theory of operation: `over` listens on a private Unix socket, has a gRPC channel connect to it, unlinks it, and pumps
bytes between that one connection and the kubelet's until either ends; then both are closed. Nothing can connect again,
so that a call on a lost channel fails with UNAVAILABLE at once. A kubelet that is silent is the caller's matter: each
call is given a timeout.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NoReturn, Protocol

import grpc
import grpc.aio

from qat_server.kubelet.sockets.grpc_socket import private_directory, short
from qat_shared.messages import KubeletService

_CHUNK: Final = 64 * 1024
_ACCEPT_TIMEOUT: Final = 5.0
# Dotted: in plugins_registry, a kubelet that starts would take any other name in any directory for a plugin's.
_NAME: Final = ".s"
_OPTIONS: Final = (
    # Subchannels are shared by address otherwise, and the address of an earlier relay may come again.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),  # as kubelet's own clients of PodResources
)


class KubeletDialer(Protocol):
    """Who connects to the kubelet's sockets: the helper's client."""

    async def open_kubelet_socket(self, service: KubeletService, wait_ms: int = 0) -> socket.socket:
        """A connected stream socket, which the caller closes. Raises HelperError."""


@asynccontextmanager
async def over(kubelet: socket.socket, directory: Path) -> AsyncIterator[grpc.aio.Channel]:
    """A channel over `kubelet`, a connected stream socket, which is closed at the end whatever happens.

    `directory` is where the private socket is for a moment: only this user may write there. Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(kubelet)
        kubelet.setblocking(False)
        channel, relayed = await _connected(directory)
        stack.enter_context(relayed)
        pumping = asyncio.create_task(_pump(relayed, kubelet))
        try:
            yield channel
        finally:
            try:
                await channel.close()
            finally:
                pumping.cancel()
                await asyncio.wait((pumping,))


async def _connected(directory: Path) -> tuple[grpc.aio.Channel, socket.socket]:
    """A channel and the other end of its connection."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(private_directory(directory))
        name = f"{stack.enter_context(short(made))}/{_NAME}"
        listening = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listening.setblocking(False)
        listening.bind(name)
        stack.callback(_unlink, name)
        listening.listen(1)
        channel = grpc.aio.insecure_channel(f"unix:{name}", options=_OPTIONS)
        try:
            channel.get_state(try_to_connect=True)
            async with asyncio.timeout(_ACCEPT_TIMEOUT):
                await _readable(listening)
            relayed, _ = listening.accept()
        except BaseException as error:
            await channel.close()
            if isinstance(error, TimeoutError):
                raise OSError(f"gRPC did not connect to a socket in {directory}") from error
            raise
    relayed.setblocking(False)
    return channel, relayed


async def _readable(listening: socket.socket) -> None:
    """Until there is a connection. Not sock_accept: cancelled at the wrong moment it loses what it accepted."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(listening, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(listening)


async def _pump(ours: socket.socket, kubelet: socket.socket) -> None:
    """Move bytes both ways until one side ends, then end both, so that no call waits for what cannot come."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_copy(ours, kubelet))
            tasks.create_task(_copy(kubelet, ours))
    except* OSError:
        pass
    finally:
        ours.close()
        kubelet.close()


async def _copy(source: socket.socket, sink: socket.socket) -> NoReturn:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK):
        await loop.sock_sendall(sink, data)
    raise ConnectionResetError


def _unlink(name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name)


def sentence(error: grpc.aio.AioRpcError) -> str:
    """What a failed call on such a channel means, for a person."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return "the kubelet closed the connection, or what answers there is not the kubelet"
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "the kubelet did not answer in time"
    return f"the kubelet answered {error.code().name}: {error.details()}"
