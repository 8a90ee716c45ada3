"""A VF that the kernel refuses to bind is on no list until it is bound, however often that is tried.

The kernel shows a driver's link before it asks the driver, and takes it away when the driver refuses. Here each probe
takes its time, so that whoever looks meanwhile sees the link.
"""

import asyncio
import contextlib
import errno
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import DevicePluginStub
from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import RunningNode, running_node

CY, GENERIC = "qat.intel.com/cy", "qat.intel.com/generic"
REFUSED = "0000:6b:00.3"
GEN4 = Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4)
GEN2 = Pf(address="0000:70:00.0", device="37c8", total_vfs=2)
LOOKING = ("--resync-interval=50ms",)
"""So often that each probe is looked at while it lasts."""
PROBE = 0.3
"""Seconds that it lasts."""
ATTEMPTS = 3


def refusals(node: RunningNode) -> Counter[str]:
    """How often each VF's binding has ended in a refusal."""
    records = map(json.loads, node.audit_lines() if node.audit_log.exists() else ())
    ended = (each for each in records if each.get("operation") == "BindDriver" and each["event"] == "done")
    return Counter(each["arguments"]["address"] for each in ended if each["verdict"] != "ok")


Lists = list[dict[str, str]]
"""Each that came: a device to its health."""


@asynccontextmanager
async def watched(node: RunningNode, resource: str) -> AsyncIterator[Lists]:
    """The lists of a resource as a second kubelet gets them."""
    lists: Lists = []

    async def watch(channel: grpc.aio.Channel) -> None:
        async for response in DevicePluginStub(channel).ListAndWatch(pb.Empty()):
            lists.append({device.ID: device.health for device in response.devices})

    path = node.kubelet.plugin_directory / f"qat.intel.com/{resource}.sock"
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        watching = asyncio.create_task(watch(channel))
        try:
            await node.until("the first list", lambda: lists)
            yield lists
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching


def refuse(node: RunningNode, attempts: int) -> None:
    """Have the kernel refuse the VF so often. At first it is also offered to its own driver, which refuses too."""
    node.kernel.delay("probe", PROBE, REFUSED)
    node.kernel.fail_next(REFUSED, "probe", errno.EINVAL, attempts + 1)


async def test_it_is_listed_when_it_is_bound_and_not_before() -> None:
    async with running_node(Node(pfs=(GEN4,)), LOOKING) as node:
        refuse(node, ATTEMPTS)
        node.start_helper()
        node.start_server()
        await node.until("the others are served", lambda: node.kubelet.allocatable() == {CY: 3})
        async with watched(node, "cy") as lists:
            await node.until("it is served in the end", lambda: node.kubelet.allocatable() == {CY: 4})
            await node.until("the list says so", lambda: REFUSED in lists[-1])
            others = dict.fromkeys(("0000:6b:00.1", "0000:6b:00.2", "0000:6b:00.4"), "Healthy")
            assert lists == [others, {**others, REFUSED: "Healthy"}]
        assert refusals(node) == {REFUSED: ATTEMPTS}
        assert node.log("server").count("VF not bound") == 1


async def test_nor_while_a_binding_goes_on_that_the_helper_waits_for_no_longer() -> None:
    async with running_node(Node(pfs=(GEN4,)), LOOKING) as node:
        node.kernel.hang("probe", REFUSED)
        node.kernel.fail_next(REFUSED, "probe", errno.EINVAL, 2)
        node.start_helper()
        node.start_server()
        await node.until("the others are served", lambda: node.kubelet.allocatable() == {CY: 3})
        async with watched(node, "cy") as lists:
            await node.until("the helper has given up", lambda: "VF not bound" in node.log("server"))
            assert node.kernel.driver(REFUSED) == "vfio-pci", "so it seems"
            node.kernel.delay("probe", PROBE, REFUSED)
            node.kernel.release("probe", REFUSED)
            bound = f'"VF bound" address="{REFUSED}"'
            await node.until("it is bound, and listed", lambda: bound in node.log("server") and REFUSED in lists[-1])
            assert [each.get(REFUSED) for each in lists] == [None, "Healthy"]
        assert b'"late"' in node.audit_log.read_bytes(), "it ended, as a refusal, when nobody waited for it any more"


async def test_it_stays_unhealthy_while_a_pod_has_it() -> None:
    """It was bound, an administrator took it away, and the kernel does not give it back."""
    async with running_node(Node(pfs=(GEN4,)), LOOKING) as node:
        node.start_helper()
        node.start_server()
        await node.until("all are served", lambda: node.kubelet.allocatable() == {CY: 4})
        pod = await node.kubelet.allocate("pod", [("main", CY, 4)])
        assert REFUSED in pod.containers["main"].envs.values()
        async with watched(node, "cy") as lists:
            refuse(node, ATTEMPTS - 1)  # it was on no driver: there is none to be offered to
            node.kernel.unbind(REFUSED)
            await node.until("it is served again", lambda: refusals(node)[REFUSED] == ATTEMPTS and len(lists) == 3)
            assert [each[REFUSED] for each in lists] == ["Healthy", "Unhealthy", "Healthy"]


@pytest.mark.parametrize("beside", [(), (GEN4,)], ids=["alone", "beside Gen4"])
async def test_vfs_on_vfios_deny_list_make_no_resource(beside: tuple[Pf, ...]) -> None:
    node_with = Node(pfs=(*beside, GEN2), disable_denylist=False)
    async with running_node(node_with, (*LOOKING, "--kernel-vf-drivers=4xxxvf,c6xxvf")) as node:
        refused = [str(GEN2.vf_address(number)) for number in range(GEN2.total_vfs)]
        for address in refused:
            node.kernel.delay("probe", PROBE, address)
        node.start_helper()
        node.start_server()
        await node.until(
            "each was tried often", lambda: all(refusals(node)[address] >= ATTEMPTS for address in refused)
        )
        assert node.kubelet.capacity() == ({CY: 4} if beside else {})
        assert {each.resource for each in node.kubelet.registrations} == ({CY} if beside else set())
        await node.until_status(  # the latest reason may be another: that an attempt took too long
            "it says why",
            lambda status: refused == [vf.address for vf in status.vfs if "disable_denylist" in vf.reason],
        )
