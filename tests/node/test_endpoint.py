"""An endpoint and the emulated kubelet over real sockets: it is registered whenever the kubelet accepts it."""

import asyncio
import logging
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
import uvloop

from qat_helper.operations import registration
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.allocation import AllocationPolicy
from qat_server.kubelet.device_plugin import DevicePlugin
from qat_server.kubelet.endpoint import Endpoint
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import (
    RegistrationStub,
    add_DevicePluginServicer_to_server,
)
from qat_server.kubelet.registration.kubelet_socket import SocketRegistrar
from qat_server.kubelet.registration.registrar import Timing
from qat_server.kubelet.sockets import grpc_socket
from qat_simulation.kubelet.kubelet import Hostility, Kubelet
from support.conditions import until
from support.endpoints import NoUsage, device, running_endpoint
from support.kubelet_sockets import DirectHelper, no_helper

CY = "qat.intel.com/cy"
QUICK = Timing(
    first_pause=0.01,
    after_failure=0.05,
    after_stream=0.05,
    settled=0.3,
    stream_first=0.1,
    stream_last=1.0,  # enough for a stream to open on a busy machine
    kubelet_wait=5.0,
)


@pytest.fixture
async def kubelet(directory: Path) -> AsyncIterator[Kubelet]:
    kubelet = Kubelet(directory)
    await kubelet.start()
    (directory / "device-plugins/qat.intel.com").mkdir()
    try:
        yield kubelet
    finally:
        await kubelet.stop()


@asynccontextmanager
async def running(
    kubelet: Kubelet,
    timing: Timing = QUICK,
    devices: int = 4,
    helper: DirectHelper | None = None,
    name: str = "cy",
) -> AsyncIterator[Endpoint]:
    sockets = kubelet.plugin_directory / "qat.intel.com"
    helper = helper or DirectHelper(kubelet.directory)
    registrar = SocketRegistrar(name, sockets, helper, timing)
    async with running_endpoint(name, registrar, [device(number) for number in range(devices)], timing) as endpoint:
        yield endpoint
    assert os.listdir(sockets) == [], "no file is left behind"


def watched(kubelet: Kubelet, number: int = 4) -> Callable[[], bool]:
    return lambda: kubelet.allocatable().get(CY) == number


async def test_it_is_served_then_registered_and_its_devices_are_allocatable(kubelet: Kubelet) -> None:
    async with running(kubelet) as endpoint:
        await kubelet.wait_for(watched(kubelet))
        await until(lambda: endpoint.state.registered)
        assert endpoint.state.registrations == 1
        assert kubelet.capacity() == {CY: 4}
        [registration] = kubelet.registrations
        assert (registration.endpoint, registration.version) == ("qat.intel.com/cy.sock", "v1beta1")
        mode = endpoint.socket_path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o660


async def test_a_new_list_reaches_the_kubelet(kubelet: Kubelet) -> None:
    async with running(kubelet) as endpoint:
        await kubelet.wait_for(watched(kubelet))
        endpoint.update([device(0), device(1, "it vanished"), device(2)])
        await kubelet.wait_for(watched(kubelet, 2))
        assert kubelet.capacity() == {CY: 3}


async def test_a_stale_socket_is_replaced(kubelet: Kubelet, directory: Path) -> None:
    stale = directory / "device-plugins/qat.intel.com/cy.sock"
    stale.touch()
    async with running(kubelet):
        await kubelet.wait_for(watched(kubelet))


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_it_registers_again_after_each_kubelet_restart(kubelet: Kubelet, kill: bool) -> None:
    async with running(kubelet) as endpoint:
        await kubelet.wait_for(watched(kubelet))
        allocation = await kubelet.allocate("pod", [("main", CY, 2)])
        for _ in range(10):
            await kubelet.restart(kill)
            assert kubelet.allocatable() == {CY: 0}
            await kubelet.wait_for(watched(kubelet))
        await until(lambda: endpoint.state.registered)
        assert kubelet.devices_of("pod") == set(allocation.devices)


async def test_one_request_waits_for_a_kubelet_that_is_down(kubelet: Kubelet) -> None:
    helper = DirectHelper(kubelet.directory)
    async with running(kubelet, helper=helper) as endpoint:
        await kubelet.wait_for(watched(kubelet))
        await kubelet.stop()
        await until(lambda: helper.waiting)
        assert not endpoint.state.registered
        requests = len(helper.requests)
        await kubelet.start()
        await kubelet.wait_for(watched(kubelet))
        assert len(helper.requests) == requests


async def test_it_registers_again_after_the_end_of_an_older_stream(kubelet: Kubelet) -> None:
    """As in a rolling update: the kubelet drops the newest client when the older stream ends."""
    async with another_plugin(kubelet, devices=3) as old:
        await kubelet.wait_for(watched(kubelet, 3))
        async with running(kubelet):
            await kubelet.wait_for(watched(kubelet, 4))
            before = len(kubelet.registrations)
            old.withdraw()
            await kubelet.wait_for(lambda: len(kubelet.registrations) > before and watched(kubelet, 4)())


@asynccontextmanager
async def another_plugin(kubelet: Kubelet, devices: int) -> AsyncIterator[DevicePlugin]:
    """An older version of the plugin, with its own socket and the same resource."""
    plugin = DevicePlugin("cy", AllocationPolicy.NONE, Counters(), NoUsage())
    plugin.update([device(number) for number in range(devices)])
    server = grpc.aio.server()
    add_DevicePluginServicer_to_server(plugin, server)
    await grpc_socket.start(server, kubelet.plugin_directory / "old.sock", 0o660)
    try:
        async with grpc.aio.insecure_channel(f"unix:{kubelet.plugin_directory}/kubelet.sock") as channel:
            await RegistrationStub(channel).Register(
                pb.RegisterRequest(version="v1beta1", endpoint="old.sock", resource_name=CY), timeout=10
            )
        yield plugin
    finally:
        await server.stop(None)


async def test_a_deleted_socket_is_recreated(kubelet: Kubelet) -> None:
    async with running(kubelet) as endpoint:
        await kubelet.wait_for(watched(kubelet))
        endpoint.socket_path.unlink()
        await kubelet.restart()
        await kubelet.wait_for(watched(kubelet))


async def test_it_waits_for_a_directory_that_does_not_exist_yet(kubelet: Kubelet) -> None:
    sockets = kubelet.plugin_directory / "qat.intel.com"
    sockets.rmdir()
    async with running(kubelet) as endpoint:
        await until(lambda: "No such file or directory" in endpoint.state.error)
        sockets.mkdir()
        await kubelet.wait_for(watched(kubelet))


async def test_a_lost_helper_does_not_end_a_registration(kubelet: Kubelet) -> None:
    helper = DirectHelper(kubelet.directory)
    async with running(kubelet, helper=helper) as endpoint:
        await kubelet.wait_for(watched(kubelet))
        helper.error = no_helper()
        endpoint.update([device(0)])
        await kubelet.wait_for(watched(kubelet, 1))
        await kubelet.restart()
        await until(lambda: endpoint.state.error == "there is no helper")
        helper.error = None
        await kubelet.wait_for(watched(kubelet, 1))


async def test_withdrawing_ends_the_stream_and_removes_the_socket(kubelet: Kubelet) -> None:
    async with running(kubelet) as endpoint:
        await kubelet.wait_for(watched(kubelet))
        async with asyncio.timeout(120):
            await endpoint.withdraw()
        await kubelet.wait_for(watched(kubelet, 0))
        assert kubelet.capacity() == {CY: 4}, "until the grace period is over"
        assert not endpoint.socket_path.exists()
        assert not endpoint.state.registered


async def test_withdrawing_and_serving_the_same_resource_again_does_not_lose_the_socket(kubelet: Kubelet) -> None:
    for number in range(1, 6):
        async with running(kubelet, devices=number) as endpoint:
            await kubelet.wait_for(watched(kubelet, number))
            assert endpoint.socket_path.exists()


async def test_several_resources_register_concurrently(kubelet: Kubelet) -> None:
    names = ("cy", "dc", "sym-dc", "generic")
    async with AsyncExitStack() as stack:
        sockets = kubelet.plugin_directory / "qat.intel.com"
        helper = DirectHelper(kubelet.directory)
        registrars = {name: SocketRegistrar(name, sockets, helper, QUICK) for name in names}
        endpoints = [
            Endpoint(name, registrar, AllocationPolicy.NONE, Counters(), NoUsage(), timing=QUICK)
            for name, registrar in registrars.items()
        ]
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        for endpoint in endpoints:
            endpoint.update([device(1)])
            tasks.create_task(endpoint.run())
        for _ in range(3):
            await kubelet.wait_for(lambda: kubelet.allocatable() == {f"qat.intel.com/{name}": 1 for name in names})
            await kubelet.restart()
        for endpoint in endpoints:
            await endpoint.withdraw()


@pytest.mark.parametrize(
    ("hostility", "error"),
    [
        (Hostility.HANG, "the kubelet did not answer in time"),
        (Hostility.REFUSE, 'the kubelet answered UNKNOWN: requested API version "not v1beta1" is not supported'),
        (Hostility.NO_STREAM, "the kubelet accepted the registration but did not open a ListAndWatch stream"),
        (Hostility.END_STREAM, "the kubelet ended the ListAndWatch stream"),
        (Hostility.CLOSE, "the kubelet closed the connection, or another program answers on its socket"),
        (Hostility.GARBAGE, "the kubelet closed the connection, or another program answers on its socket"),
    ],
)
async def test_registration_with_a_hostile_kubelet_is_retried_with_growing_pauses(
    kubelet: Kubelet,
    hostility: Hostility,
    error: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "qat_server.kubelet.endpoint")
    monkeypatch.setattr(registration, "ANSWER_TIMEOUT", 0.5)
    kubelet.hostility = hostility
    await kubelet.restart()
    helper = DirectHelper(kubelet.directory)
    loop = asyncio.get_running_loop()
    async with running(kubelet, helper=helper) as endpoint:
        began = loop.time()
        await until(lambda: error in endpoint.state.error and len(helper.requests) >= 8)
        # Pauses of at least 0, (0,) 10, 20, 40, 50, 50 ms.
        assert loop.time() - began > 0.15
        changes = [record for record in caplog.records if record.levelno >= logging.INFO]
        assert len(changes) < 8, "a line for each change, not for each attempt"
        kubelet.hostility = Hostility.NONE
        await kubelet.restart()
        await kubelet.wait_for(watched(kubelet))
        await until(lambda: endpoint.state.registered)


def test_on_uvloop(directory: Path) -> None:
    """The event loop used in production, which has its own socket implementation."""

    async def scenario() -> None:
        kubelet = Kubelet(directory)
        await kubelet.start()
        (directory / "device-plugins/qat.intel.com").mkdir()
        try:
            async with running(kubelet) as endpoint:
                await kubelet.wait_for(watched(kubelet))
                await kubelet.restart()
                await kubelet.wait_for(watched(kubelet))
                await endpoint.withdraw()
                await kubelet.wait_for(watched(kubelet, 0))
        finally:
            await kubelet.stop()

    uvloop.run(scenario())
