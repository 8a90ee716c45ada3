"""gRPC over a passed socket: how the relay starts, fails and ends."""

import asyncio
import os
import socket
from pathlib import Path

import grpc.aio
import pytest

from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import RegistrationStub
from qat_server.kubelet.sockets import kubelet_channel
from qat_simulation.kubelet.kubelet import Kubelet
from support.conditions import until


async def test_the_relay_works_from_a_directory_too_deep_for_a_socket(directory: Path) -> None:
    kubelet = Kubelet(directory)
    await kubelet.start()
    deep = directory / ("d" * 100)
    deep.mkdir()
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.connect(f"{kubelet.plugin_directory}/kubelet.sock")
    async with kubelet_channel.open_channel(connected, deep) as channel:
        assert os.listdir(deep) == []
        with pytest.raises(grpc.aio.AioRpcError, match="not supported by kubelet"):
            await RegistrationStub(channel).Register(pb.RegisterRequest(version="v0"), timeout=60)
    assert connected.fileno() == -1
    await kubelet.stop()


async def test_a_call_on_the_relay_fails_at_once_when_the_peer_closes(directory: Path) -> None:
    ours, theirs = socket.socketpair()
    async with kubelet_channel.open_channel(ours, directory) as channel:
        call = RegistrationStub(channel).Register(pb.RegisterRequest(), timeout=60)
        loop = asyncio.get_running_loop()
        theirs.setblocking(False)
        assert (await loop.sock_recv(theirs, 3)) == b"PRI", "HTTP/2 arrives unchanged"
        theirs.close()
        for attempt in (call, RegistrationStub(channel).Register(pb.RegisterRequest(), timeout=60)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await attempt
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert os.listdir(directory) == []


async def test_the_connection_ends_although_the_helper_has_a_copy(directory: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours.dup(), theirs:
        async with kubelet_channel.open_channel(ours, directory) as channel:
            assert channel.get_state() is not grpc.ChannelConnectivity.SHUTDOWN
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(60):
            while await loop.sock_recv(theirs, 65536):
                pass
        unused, other = socket.socketpair()
        with unused.dup(), other, pytest.raises(OSError, match="No such file"):
            async with kubelet_channel.open_channel(unused, directory / "missing"):
                pass
        assert other.fileno() == -1


async def test_the_relay_is_cancelled_cleanly_at_any_moment(directory: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for steps in range(12):
        ours, theirs = socket.socketpair()

        async def use(ours: socket.socket = ours) -> None:
            async with kubelet_channel.open_channel(ours, directory) as channel:
                await RegistrationStub(channel).Register(pb.RegisterRequest(), timeout=60)

        task = asyncio.create_task(use())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        theirs.close()
        # A task that never started has not closed its socket.
        ours.close()
        assert os.listdir(directory) == []
    await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 4)
