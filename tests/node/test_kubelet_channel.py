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
from qat_shared.messages import KubeletService
from qat_simulation.kubelet.kubelet import Kubelet
from support.conditions import until
from support.kubelet_sockets import DirectHelper


async def test_the_relay_works_from_a_directory_too_deep_for_a_socket(directory: Path) -> None:
    kubelet = Kubelet(directory)
    await kubelet.start()
    deep = directory / ("d" * 100)
    deep.mkdir()
    connected = await DirectHelper(directory).open_kubelet_socket(KubeletService.REGISTRATION)
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
