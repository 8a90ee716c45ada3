"""What happens to devices from outside, and how soon the kubelet's list follows."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable

import grpc.aio

from kernel.nodes import PF, SMALL, TWO_SMALL, VF
from kernel.real_node import PATIENCE, RealNode, real_node
from kubelet.nodes import CY, DC
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import DevicePluginStub
from qat_simulation.node.description import Pf

TIMES = 50


class Lists:
    """The lists of one resource, as a second kubelet would get them."""

    def __init__(self, stream: AsyncIterator[pb.ListAndWatchResponse]) -> None:
        self._stream = stream

    async def until(self, address: str, health: str) -> float:
        """When (time.monotonic) the list came in which a device is Healthy or Unhealthy."""
        while True:
            response = await asyncio.wait_for(anext(self._stream), PATIENCE)
            if any(address == device.ID and device.health == health for device in response.devices):
                return time.monotonic()


def spread(times: list[float]) -> str:
    return f"median {statistics.median(times) * 1e3:.0f} ms, p99 {statistics.quantiles(times, n=100)[98] * 1e3:.0f} ms"


async def test_an_administrators_echo_reaches_the_list(record_property: Callable[[str, object], None]) -> None:
    async with real_node(SMALL, ("--resync-interval=1h",)) as node:  # so that nothing but uevents can tell
        await node.start({CY: 4})
        await node.until_bound()
        await node.stop_helper()  # so that nobody binds again what the administrator takes away
        gone, back = [], []
        async with grpc.aio.insecure_channel(f"unix:{node.sockets}/cy.sock") as channel:
            lists = Lists(aiter(DevicePluginStub(channel).ListAndWatch(pb.Empty())))
            await lists.until(VF, "Healthy")
            for _ in range(TIMES):
                began = time.monotonic()
                node.real.unbind(VF)
                gone.append(await lists.until(VF, "Unhealthy") - began)
                began = time.monotonic()
                node.real.bind(VF, "vfio-pci")
                back.append(await lists.until(VF, "Healthy") - began)
        record_property("measured", f"unbind by hand to the new list, {TIMES} times: {spread(gone)}")
        record_property("measured", f"bind by hand to the new list, {TIMES} times: {spread(back)}")
        node.start_helper()


async def all_alive(node: RealNode) -> None:
    node.check_alive()
    assert node.kubelet.alive
    assert (await node.kubelet.check()).violations == ()


async def with_new_host_bridges(node: RealNode) -> None:
    """The helper's sandbox knows those that were there when it began: it says so, and is started again."""
    await node.until_status(
        "the reason is told", lambda status: any("restart the helper" in vf.reason for vf in status.vfs)
    )
    await all_alive(node)
    await node.stop_helper()
    node.start_helper()


async def test_a_pf_goes_and_comes_and_another_is_plugged_in() -> None:
    async with real_node(TWO_SMALL) as node:
        await node.start({CY: 4})
        await node.until_bound()
        held = await node.kubelet.allocate("pod", [("main", CY, 1)])
        (address,) = held.devices
        pf = address[:-1] + "0"
        # The driver is taken from it: its VFs go with that.
        node.real.unbind(pf)
        await node.wait({CY: 2})
        assert (await node.kubelet.capacity())[CY] >= 3, "what a pod holds stays on the list"
        await all_alive(node)
        node.real.bind(pf, "4xxx")
        node.real.set_state(pf, "down")
        node.real.set_services(pf, "asym;sym")
        node.real.set_numvfs(pf, 1)
        await node.wait({CY: 4})
        # Removed, and found again by a rescan: with its first configuration, and without VFs.
        node.real.remove(pf)
        await node.wait({CY: 2})
        node.real.rescan()
        node.real.set_state(pf, "down")
        node.real.set_services(pf, "asym;sym")
        node.real.set_numvfs(pf, 1)
        await node.wait({CY: 4})
        # Pulled out without a word.
        node.real.unplug(pf)
        await node.wait({CY: 2})
        await all_alive(node)
        # A new one.
        node.real.add_pf(Pf(address="0000:77:00.0", services="dc", total_vfs=3))
        await with_new_host_bridges(node)
        await node.wait({CY: 2, DC: 3})
        await node.kubelet.free("pod")
        await all_alive(node)


async def test_the_drivers_module_is_unloaded_and_loaded_again() -> None:
    async with real_node(SMALL) as node:
        await node.start({CY: 4})
        await node.until_bound()
        await node.kubelet.allocate("pod", [("main", CY, 1)])
        node.real.unload()
        await node.wait({CY: 0})
        await all_alive(node)
        node.real.load()
        await with_new_host_bridges(node)
        await node.wait({CY: 4})
        await node.until_bound()
        await all_alive(node)


async def test_a_lost_heartbeat_takes_the_pfs_vfs_and_gives_them_back() -> None:
    async with real_node(TWO_SMALL, ("--health-interval=500ms",)) as node:
        await node.start({CY: 4})
        await node.until_bound()
        node.real.set_heartbeat(PF, -1)
        await node.wait({CY: 2})
        node.real.set_heartbeat(PF, 0)
        await node.wait({CY: 4})
