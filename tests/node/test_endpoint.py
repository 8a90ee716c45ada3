"""An endpoint against the emulated kubelet over real sockets: it is registered whenever the kubelet lets it be."""

import asyncio
import logging
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kubelet_sockets import DirectHelper, gone, short_directory
from qat_server.allocation import AllocationPolicy
from qat_server.counters import Counters
from qat_server.endpoint import Endpoint, Timing
from qat_server.inventory import Device
from qat_server.simulation.kubelet import Hostility, Kubelet
from qat_shared.pci import PciAddress
from waiting import until

CY = "qat.intel.com/cy"
QUICK = Timing(
    first=0.01, after_failure=0.05, after_stream=0.05, settled=0.3, register=0.5, stream_first=0.2, kubelet=5.0
)


def device(function: int, reason: str = "") -> Device:
    address = PciAddress(0, 0x6B, 0, function)
    return Device(address, PciAddress(0, 0x6B, 0, 0), 0, (f"/dev/vfio/{function}", "/dev/vfio/vfio"), (), reason)


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as made:
        yield made


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
    endpoint = Endpoint(name, sockets, helper, AllocationPolicy.NONE, Counters(), timing=timing)
    endpoint.update([device(number) for number in range(devices)])
    task = asyncio.create_task(endpoint.run())
    try:
        yield endpoint
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert os.listdir(sockets) == [], "nothing is left behind"


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
async def test_a_kubelet_restart_is_survived_again_and_again(kubelet: Kubelet, kill: bool) -> None:
    async with running(kubelet) as endpoint:
        await kubelet.wait_for(watched(kubelet))
        allocation = await kubelet.allocate("pod", [("main", CY, 2)])
        for _ in range(10):
            await kubelet.restart(kill)
            assert kubelet.allocatable() == {CY: 0}
            await kubelet.wait_for(watched(kubelet))
        await until(lambda: endpoint.state.registered)
        assert kubelet.devices_of("pod") == set(allocation.devices)


async def test_a_kubelet_that_is_down_costs_one_waiting_request(kubelet: Kubelet) -> None:
    helper = DirectHelper(kubelet.directory)
    async with running(kubelet, helper=helper) as endpoint:
        await kubelet.wait_for(watched(kubelet))
        asked = len(helper.asked)
        await kubelet.stop()
        await until(lambda: len(helper.asked) > asked)
        assert not endpoint.state.registered
        await kubelet.start()
        await kubelet.wait_for(watched(kubelet))
        assert len(helper.asked) == asked + 1


async def test_the_end_of_an_older_stream_is_answered_too(kubelet: Kubelet) -> None:
    """The trap of a rolling update: the kubelet drops the newest client when the older one's stream ends."""
    async with running(kubelet) as old:
        await kubelet.wait_for(watched(kubelet))
        # A second server of the same resource, its socket elsewhere, as with two versions of a plugin.
        other = kubelet.plugin_directory / "other"
        other.mkdir()
        new = Endpoint("cy", other, DirectHelper(kubelet.directory), AllocationPolicy.NONE, Counters(), timing=QUICK)
        new.update([device(number) for number in range(3)])
        # The endpoint's directory is fixed in Register: lead the name there to the other's socket once it is served.
        task = asyncio.create_task(new.run())
        try:
            await until(lambda: (other / "cy.sock").exists())
            old.socket_path.rename(other / "old.sock")
            old.socket_path.symlink_to(other / "cy.sock")
            await kubelet.restart()
            await kubelet.wait_for(watched(kubelet, 3))
            await old.withdraw()
            await kubelet.wait_for(watched(kubelet, 3))
        finally:
            await new.withdraw()
            await task
            old.socket_path.unlink(missing_ok=True)
