"""The kubelet goes and comes back: the server is registered again, pods keep their devices, nothing piles up."""

import asyncio
import os
import time
from pathlib import Path
from typing import get_args

import pytest

from kubelet.footprint import Footprint, footprint
from kubelet.measured import Timed
from kubelet.nodes import CY, DC, EVERY_ALLOCATABLE, EVERY_DRIVER, EVERY_RESOURCE, ONE_PF
from kubelet.production import ProductionNode, production_node
from kubelet.real_kubelet import Damage, RealKubelet
from qat_server.kubelet.registration.directories import Registration
from qat_simulation.kubelet.topology import TopologyPolicy

RESTARTS = 200
GROWTH = 6 << 10
"""Bytes of memory for each restart of the second half. Seen: 1 to 2 KiB, from the 200th on less than 1 KiB, from the
500th on less than 0.5 KiB: the heap fills, nothing leaks (docs/kubelet.md). Of the helper none at all."""
PATIENCE = 60.0
"""Seconds that what a process holds has to settle: only a leak takes so long."""
DAMAGES = get_args(Damage)


async def restart(node: ProductionNode[RealKubelet], kill: bool, allocatable: dict[str, int]) -> float:
    """Seconds from the kubelet's start (its socket comes some 20 ms later, killed or not) until allocatable is so."""
    await node.kubelet.stop(kill)
    began = time.monotonic()
    assert await node.kubelet.start() == ()
    await node.wait(allocatable)
    return time.monotonic() - began


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize("policy", [TopologyPolicy.NONE, TopologyPolicy.RESTRICTED])
async def test_pods_keep_their_devices(policy: TopologyPolicy, kill: bool, registration: Registration) -> None:
    async with production_node(EVERY_RESOURCE, EVERY_DRIVER, policy, registration) as node:
        await node.start(EVERY_ALLOCATABLE)
        pods = {
            name: set((await node.kubelet.allocate(name, asked)).devices)
            for name, asked in (("a", [("main", CY, 2), ("side", DC, 1)]), ("b", [("main", CY, 2)]))
        }
        what = f"kubelet {'killed' if kill else 'stopped'}: its start to allocatable"
        async with Timed(what, 1, registration) as timed:
            for _ in range(3):
                await timed.add(await restart(node, kill, EVERY_ALLOCATABLE))
                for name, devices in pods.items():
                    assert await node.kubelet.devices_of(name) == devices
                assert (await node.kubelet.check()).violations == ()
        await node.settled(EVERY_ALLOCATABLE)
        await node.free_in_the_end({**EVERY_ALLOCATABLE, CY: 4, DC: 2})
        await node.admit("c", [("main", CY, 2)])


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_checkpoint_is_the_kubelets_loss_alone(damage: Damage, registration: Registration) -> None:
    """The kubelet forgets who has what, and gives the same devices out again. We are registered again as ever."""
    async with production_node(ONE_PF, registration=registration) as node:
        await node.start({CY: 4})
        first = (await node.kubelet.allocate("first", [("main", CY, 3)])).devices
        await node.kubelet.stop(kill=True)
        node.kubelet.damage_checkpoint(damage)
        async with Timed("kubelet killed, checkpoint damaged: its start to allocatable", 1, registration) as timed:
            began = time.monotonic()
            assert await node.kubelet.start() == ()
            await node.wait({CY: 4})
            await timed.add(time.monotonic() - began)
        assert await node.kubelet.devices_of("first") == set()
        second = (await node.admit("second", [("main", CY, 4)])).devices
        assert set(first) < set(second)
        assert [vf.driver for vf in (await node.status()).vfs] == ["vfio-pci"] * 4
        await node.kubelet.free("first")
        await node.refused("third", [("main", CY, 1)], "Available: 0")
        await node.kubelet.free("second")


async def test_200_restarts_leave_nothing_behind() -> None:
    """In both modes, beside each other, since most of it is waiting. Every other restart is a SIGKILL."""
    async with asyncio.TaskGroup() as tasks:
        for registration in Registration:
            tasks.create_task(restart_often(registration))


async def restart_often(registration: Registration) -> None:
    async with production_node(ONE_PF, registration=registration) as node:
        await node.start({CY: 4})
        held = set((await node.kubelet.allocate("pod", [("main", CY, 2)])).devices)
        await node.until_bound()
        for n in range(20):  # what the first restarts load stays loaded
            await restart(node, bool(n % 2), {CY: 4})
        before = await settled(node)
        files = os.listdir(node.sockets)
        what = f"one of {RESTARTS} kubelet restarts in a row: its start to allocatable"
        halfway = before
        async with Timed(what, 1, registration) as timed:
            for n in range(RESTARTS):
                if n == RESTARTS // 2:
                    halfway = await settled(node, before)
                await timed.add(await restart(node, bool(n % 2), {CY: 4}))
        assert await node.kubelet.devices_of("pod") == held
        after = await settled(node, before)
        for name in before:
            assert after[name].descriptors == before[name].descriptors, name
            assert after[name].threads - before[name].threads < 4, name  # gRPC's own come and go
            # A leak goes on as it began; what an allocator has not filled yet gets less and less.
            assert after[name].memory - halfway[name].memory < GROWTH * RESTARTS // 2, name
        await node.until("as many sockets as before", lambda: len(os.listdir(node.sockets)) == len(files), PATIENCE)


def children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


async def settled(
    node: ProductionNode[RealKubelet], wanted: dict[str, Footprint] | None = None
) -> dict[str, Footprint]:
    """What both processes hold between operations, once it is `wanted` (or not even after long), or stays the same."""
    assert node.helper is not None
    assert node.server is not None
    pids = {"helper": node.helper.pid, "server": node.server.pid}
    deadline = time.monotonic() + PATIENCE
    found: dict[str, Footprint] = {}
    same = 0
    while True:
        before, found = found, {name: footprint(pid) for name, pid in pids.items()}
        known = before if wanted is None else wanted
        idle = not children(node.helper.pid)  # no operation is under way
        alike = all(name in known and found[name].descriptors == known[name].descriptors for name in found)
        same = same + 1 if idle and alike else 0
        if same >= (1 if wanted is not None else 20) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.05)
