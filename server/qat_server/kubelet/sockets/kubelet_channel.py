"""gRPC to the kubelet over a socket that the helper has connected, by relaying bytes: grpcio takes no descriptor.

Theory of operation: `open_channel` listens on a temporary Unix socket, lets a gRPC channel connect to it, and unlinks
it. It then copies bytes between that connection and the kubelet's until either ends, and closes both. No client can
connect again, so a call on a broken channel fails with UNAVAILABLE at once. A kubelet that does not answer is the
caller's responsibility: each call needs a timeout.
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

from qat_server.kubelet.sockets.socket_files import short_path, temporary_directory

_CHUNK: Final = 64 * 1024
_ACCEPT_TIMEOUT: Final = 5.0
# The dot hides it: in plugins_registry, a kubelet that starts takes any other name in any directory for a plugin.
_NAME: Final = ".s"
_OPTIONS: Final = (
    # Otherwise subchannels are shared by address, and a later relay may reuse the address of an earlier one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),  # as in the kubelet's own PodResources client
)


class PodResourcesDialer(Protocol):
    """Connects to the kubelet's PodResources, as the helper's client does."""

    async def open_pod_resources(self, wait_ms: int = 0) -> socket.socket:
        """A connected stream socket, which the caller closes. Raises HelperError."""


@asynccontextmanager
async def open_channel(kubelet: socket.socket, directory: Path) -> AsyncIterator[grpc.aio.Channel]:
    """A channel over `kubelet`, a connected stream socket. The connection is ended in every case.

    The temporary socket is made in `directory`, which only this user may be able to write to. Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_end, kubelet)
        kubelet.setblocking(False)
        channel, relayed = await _connect(directory)
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


async def _connect(directory: Path) -> tuple[grpc.aio.Channel, socket.socket]:
    """A channel and the other end of its connection."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(temporary_directory(directory))
        name = f"{stack.enter_context(short_path(made))}/{_NAME}"
        listening = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listening.setblocking(False)
        listening.bind(name)
        stack.callback(_unlink, name)
        listening.listen(1)
        channel = grpc.aio.insecure_channel(f"unix:{name}", options=_OPTIONS)
        try:
            channel.get_state(try_to_connect=True)
            async with asyncio.timeout(_ACCEPT_TIMEOUT):
                await _wait_until_readable(listening)
            relayed, _ = listening.accept()
        except BaseException as error:
            await channel.close()
            if isinstance(error, TimeoutError):
                raise OSError(f"gRPC did not connect to a socket in {directory}") from error
            raise
    relayed.setblocking(False)
    return channel, relayed


async def _wait_until_readable(listening: socket.socket) -> None:
    """Return when a client connects. (sock_accept can lose the accepted connection when it is cancelled.)"""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(listening, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(listening)


async def _pump(ours: socket.socket, kubelet: socket.socket) -> None:
    """Copy bytes both ways until one side ends, then close both, so that no call waits for ever."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_copy(ours, kubelet))
            tasks.create_task(_copy(kubelet, ours))
    except* OSError:
        pass
    finally:
        ours.close()
        _end(kubelet)


def _end(kubelet: socket.socket) -> None:
    """Shut the connection down, and not only close it: the helper has a copy of the descriptor."""
    with contextlib.suppress(OSError):
        kubelet.shutdown(socket.SHUT_RDWR)
    kubelet.close()


async def _copy(source: socket.socket, sink: socket.socket) -> NoReturn:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK):
        await loop.sock_sendall(sink, data)
    raise ConnectionResetError


def _unlink(name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name)


def describe(error: grpc.aio.AioRpcError) -> str:
    """The reason why a call on such a channel failed, for log messages and status."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return "the kubelet closed the connection, or another program answers on its socket"
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "the kubelet did not answer in time"
    return f"the kubelet answered {error.code().name}: {error.details()}"
