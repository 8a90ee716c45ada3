"""An endpoint and the emulated plugin watcher, with short periods: it is registered whenever it can be."""

import asyncio
import functools
import logging
import os
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import grpc.aio
import pytest
import uvloop
from msgspec.structs import replace

from qat_server.kubelet.endpoint import Endpoint
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as deviceplugin
from qat_server.kubelet.generated import pluginregistration_v1_pb2 as registration
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import DevicePluginStub
from qat_server.kubelet.generated.pluginregistration_v1_pb2_grpc import RegistrationStub
from qat_server.kubelet.registration.plugin_watcher import WatcherRegistrar
from qat_server.kubelet.registration.registrar import Timing
from qat_simulation.kubelet.kubelet import Hostility, Kubelet
from support.conditions import until
from support.endpoints import device, running_endpoint

CY = "qat.intel.com/cy"
Watching: TypeAlias = "grpc.aio.UnaryStreamCall[deviceplugin.Empty, deviceplugin.ListAndWatchResponse]"
PERIOD = 0.02
QUICK = Timing(
    first_pause=0.01,
    after_failure=0.05,
    after_stream=0.05,
    settled=0.3,
    stream_first=0.1,
    stream_last=10.0,
    discovery=5.0,
)
DEVICES = [device(number) for number in range(4)]


@pytest.fixture
async def kubelet(directory: Path) -> AsyncIterator[Kubelet]:
    async with started(directory) as kubelet:
        yield kubelet


@asynccontextmanager
async def started(directory: Path) -> AsyncIterator[Kubelet]:
    kubelet = Kubelet(directory, watcher_period=PERIOD)
    await kubelet.start()
    sockets(kubelet).mkdir()
    try:
        yield kubelet
    finally:
        await kubelet.stop()


def sockets(kubelet: Kubelet) -> Path:
    return kubelet.registry_directory / "qat.intel.com"


@asynccontextmanager
async def running(kubelet: Kubelet, name: str = "cy", timing: Timing = QUICK) -> AsyncIterator[Endpoint]:
    registrar = WatcherRegistrar(name, sockets(kubelet), timing)
    async with running_endpoint(name, registrar, DEVICES, timing) as endpoint:
        yield endpoint


async def allocatable(kubelet: Kubelet, number: int = 4) -> None:
    await kubelet.wait_for(lambda: kubelet.allocatable().get(CY) == number)


async def test_the_watcher_finds_it_and_its_devices_are_allocatable(kubelet: Kubelet) -> None:
    async with running(kubelet) as endpoint:
        await allocatable(kubelet)
        await until(lambda: endpoint.state.registered)
        assert endpoint.state.registrations == 1
        [registered] = kubelet.registrations
        assert (registered.endpoint, registered.version) == (str(endpoint.socket_path), "v1beta1")
        mode = endpoint.socket_path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o660
        pod = await kubelet.allocate("pod", [("main", CY, 1)])
        assert pod.envs == {"QAT0": "0000:6b:00.0"}


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_it_is_registered_again_after_each_kubelet_restart(kubelet: Kubelet, kill: bool) -> None:
    async with running(kubelet) as endpoint:
        await allocatable(kubelet)
        for _ in range(10):
            await kubelet.restart(kill)
            await allocatable(kubelet)
        await until(lambda: endpoint.state.registered)


async def test_a_kubelet_that_starts_late_finds_the_same_socket(kubelet: Kubelet) -> None:
    await kubelet.stop()
    async with running(kubelet, timing=Timing()) as endpoint:
        await until(endpoint.socket_path.exists)
        made = endpoint.socket_path.stat().st_ctime_ns
        await kubelet.start()
        await allocatable(kubelet)
        assert endpoint.socket_path.stat().st_ctime_ns == made


async def test_a_kubelet_that_stays_down_is_logged_once(kubelet: Kubelet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qat_server.kubelet.endpoint")
    await kubelet.stop()
    timing = Timing(first_pause=0.01, after_failure=0.02, discovery=0.5)  # long enough to be found on a busy machine
    async with running(kubelet, timing=timing) as endpoint:
        made = set()

        def several() -> bool:
            if endpoint.socket_path.exists():
                made.add(endpoint.socket_path.stat().st_ctime_ns)
            return len(made) >= 3

        await until(several)
        assert "has not called GetInfo at" in endpoint.state.error
        assert len(caplog.records) == 1
        await kubelet.start()
        await allocatable(kubelet)


async def test_after_the_end_of_a_stream_the_socket_is_recreated_under_its_name(kubelet: Kubelet) -> None:
    async with running(kubelet) as endpoint:
        await allocatable(kubelet)
        await until(lambda: endpoint.state.registered)
        before, path = endpoint.socket_path.stat().st_ctime_ns, endpoint.socket_path
        await kubelet.plugins.plugin_gone(CY)  # it drops the client, and would never call GetInfo again
        await kubelet.wait_for(lambda: len(kubelet.registrations) == 2)
        await allocatable(kubelet)
        assert endpoint.socket_path == path
        assert path.stat().st_ctime_ns != before
        await until(lambda: endpoint.state.registrations == 2)


async def test_no_new_socket_after_a_getinfo_that_came_before_the_old_stream_ended(kubelet: Kubelet) -> None:
    """The kubelet is about to connect: a new socket would end its stream, or make it register all over again."""
    await kubelet.stop()
    async with running(kubelet, timing=Timing()) as endpoint, AsyncExitStack() as channels:
        await until(endpoint.socket_path.exists)
        made = endpoint.socket_path.stat().st_ctime_ns
        old, new = [
            await channels.enter_async_context(grpc.aio.insecure_channel(f"unix:{endpoint.socket_path}"))
            for _ in range(2)
        ]
        first = await watched(old)
        await until(lambda: endpoint.state.registrations == 1)
        await RegistrationStub(new).GetInfo(registration.InfoRequest())
        first.cancel()
        await until(lambda: not endpoint.state.registered)
        second = await watched(new)
        await until(lambda: endpoint.state.registrations == 2)
        assert endpoint.socket_path.stat().st_ctime_ns == made
        assert not second.done()


async def watched(channel: grpc.aio.Channel) -> Watching:
    """The calls of a kubelet that has found the socket."""
    await RegistrationStub(channel).GetInfo(registration.InfoRequest())
    call: Watching = DevicePluginStub(channel).ListAndWatch(deviceplugin.Empty())
    devices = await call.read()
    assert isinstance(devices, deviceplugin.ListAndWatchResponse)
    assert len(devices.devices) == 4
    status = registration.RegistrationStatus(plugin_registered=True)
    await RegistrationStub(channel).NotifyRegistrationStatus(status)
    return call


def registered_times(endpoint: Endpoint, number: int) -> bool:
    return endpoint.state.registrations == number


async def test_no_connection_is_refused_while_the_socket_is_recreated(kubelet: Kubelet) -> None:
    async with running(kubelet) as endpoint:
        await allocatable(kubelet)
        for n in range(1, 6):
            await until(functools.partial(registered_times, endpoint, n))
            before = endpoint.socket_path.stat().st_ctime_ns
            await kubelet.plugins.plugin_gone(CY)
            while endpoint.socket_path.stat().st_ctime_ns == before:
                _, writer = await asyncio.open_unix_connection(str(endpoint.socket_path))
                writer.close()
                await writer.wait_closed()


async def test_a_deleted_socket_is_recreated(kubelet: Kubelet) -> None:
    async with running(kubelet) as endpoint:
        await allocatable(kubelet)
        endpoint.socket_path.unlink()
        await kubelet.wait_for(lambda: len(kubelet.registrations) == 2)
        await allocatable(kubelet)


async def test_withdrawing_deregisters(kubelet: Kubelet) -> None:
    async with running(kubelet) as endpoint:
        await allocatable(kubelet)
        async with asyncio.timeout(120):
            await endpoint.withdraw()
        await allocatable(kubelet, 0)
        assert os.listdir(sockets(kubelet)) == []
        assert not endpoint.state.registered


async def test_several_resources_register_concurrently(kubelet: Kubelet) -> None:
    names = ("cy", "dc", "sym-dc", "generic")
    async with AsyncExitStack() as stack:
        for name in names:
            await stack.enter_async_context(running(kubelet, name))
        for _ in range(3):
            await kubelet.wait_for(lambda: kubelet.allocatable() == {f"qat.intel.com/{name}": 4 for name in names})
            await kubelet.restart()


@pytest.mark.parametrize(
    ("hostility", "error"),
    [
        (Hostility.HANG, "the kubelet has not called GetInfo at"),
        (
            Hostility.REFUSE,
            "the kubelet refused: RegisterPlugin error -- plugin validation failed with err: manager version, v1beta1,"
            " is not among plugin supported versions [not v1beta1]",
        ),
        (Hostility.NO_STREAM, "the kubelet accepted the registration but did not open a ListAndWatch stream"),
        (Hostility.END_STREAM, "the kubelet ended the ListAndWatch stream"),
    ],
)
async def test_registration_with_a_hostile_kubelet_is_retried_with_pauses(
    kubelet: Kubelet, hostility: Hostility, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qat_server.kubelet.endpoint")
    kubelet.hostility = hostility
    # A short wait only for the kubelet that hangs: the others answer as fast as the machine allows.
    timing = replace(QUICK, discovery=0.5) if hostility is Hostility.HANG else QUICK
    made: set[int] = set()
    async with running(kubelet, timing=timing) as endpoint:

        def seen() -> bool:
            if endpoint.socket_path.exists():
                made.add(endpoint.socket_path.stat().st_ctime_ns)
            return error in endpoint.state.error and len(made) >= 3

        began = asyncio.get_running_loop().time()
        await until(seen)
        assert asyncio.get_running_loop().time() - began > 0.03, "no busy loop"
        assert len(caplog.records) < 8, "a line for each change, not for each attempt"
        kubelet.hostility = Hostility.NONE
        await kubelet.restart()
        await allocatable(kubelet)
        await until(lambda: endpoint.state.registered)


async def test_a_client_that_is_not_a_kubelet_does_no_harm(kubelet: Kubelet) -> None:
    """A client that connects to the socket and sends nothing, or something other than HTTP/2."""
    async with running(kubelet) as endpoint:
        await allocatable(kubelet)
        for packet in (b"", b"\x00\xff this is no HTTP/2 at all\r\n" * 100):
            _, writer = await asyncio.open_unix_connection(str(endpoint.socket_path))
            writer.write(packet)
            writer.close()
        await kubelet.restart()
        await allocatable(kubelet)


def test_on_uvloop(directory: Path) -> None:
    """The event loop used in production, which has its own socket implementation."""

    async def scenario() -> None:
        async with started(directory) as kubelet, running(kubelet) as endpoint:
            await allocatable(kubelet)
            await kubelet.restart()
            await allocatable(kubelet)
            await kubelet.plugins.plugin_gone(CY)
            await kubelet.wait_for(lambda: kubelet.allocatable() == {CY: 4})
            await endpoint.withdraw()
            await allocatable(kubelet, 0)

    uvloop.run(scenario())
