"""Scenarios for both kubelets. Each tells what was seen, in plain values: the real and the emulated one must agree.

What is not for a device plugin to feel is left out: the order of ids in a refusal, names with random parts in them.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias, get_args

from msgspec import Struct

from kubelet import answers
from kubelet.either import AnyKubelet
from kubelet.nodes import CY, DC, EVERY_ALLOCATABLE, EVERY_DRIVER, EVERY_RESOURCE, GENERIC, LONE, ONE_PF, TWO_NODES
from kubelet.production import ProductionNode
from kubelet.real_kubelet import Damage
from qat_server.kubelet.registration.directories import Registration
from qat_simulation.kubelet.kubelet import AdmissionError
from qat_simulation.kubelet.topology import TopologyPolicy
from qat_simulation.node.description import Node

AnyNode: TypeAlias = ProductionNode[AnyKubelet]
Seen: TypeAlias = list[Any]
WATCHED: Final = Registration.PLUGIN_WATCHER


class Scenario(Struct, frozen=True):
    """`run` is given the node once all of `allocatable` is."""

    node: Node
    allocatable: dict[str, int]
    run: Callable[[AnyNode], Awaitable[Seen]]
    policy: TopologyPolicy = TopologyPolicy.BEST_EFFORT
    options: tuple[str, ...] = ()
    registration: Registration = Registration.KUBELET_SOCKET


async def quantities(node: AnyNode) -> Seen:
    """Capacity, allocatable, and what is free of it."""
    kubelet = node.kubelet
    return [await kubelet.capacity(), await kubelet.allocatable(), await kubelet.allocatable_free()]


async def admitted(node: AnyNode, pod: str, *asked: tuple[str, str, int]) -> Any:
    """What each container is started with, or why the pod is refused."""
    try:
        allocation = await node.kubelet.allocate(pod, asked)
    except AdmissionError as error:
        text = error.message if isinstance(error, answers.AdmissionError) else str(error)
        return type(error).__mro__[0].__name__, text
    return {
        name: (sorted(each.devices), dict(each.envs), sorted(each.device_nodes), sorted(each.mounts))
        for name, each in allocation.containers.items()
    }


async def all_resources(node: AnyNode) -> Seen:
    # A container each: of two resources' QAT0 in one container, the kubelet keeps whichever comes first in a map.
    pod = await admitted(node, "a", ("one", CY, 2), ("two", DC, 1), ("three", GENERIC, 1))
    return [pod, *await quantities(node), sorted(await node.kubelet.devices_of("a"))]


async def one_after_the_other(node: AnyNode) -> Seen:
    pods = [await admitted(node, f"pod-{n}", ("main", CY, n), ("side", CY, 1)) for n in (1, 2, 3, 4)]
    before = await quantities(node)
    await node.kubelet.free("pod-1")
    return [pods, before, await admitted(node, "late", ("main", CY, 1)), await quantities(node)]


async def more_than_there_is(node: AnyNode) -> Seen:
    seen = [await admitted(node, "greedy", ("main", CY, 13)), await admitted(node, "unknown", ("main", DC, 1))]
    seen += [await admitted(node, "half", ("one", CY, 12), ("two", CY, 1)), await quantities(node)]
    return [*seen, await admitted(node, "a", ("main", CY, 12))]


async def too_much_for_one_numa_node(node: AnyNode) -> Seen:
    seen = [await admitted(node, "a", ("main", CY, 9)), await admitted(node, "b", ("main", CY, 3))]
    return [*seen, await admitted(node, "c", ("main", CY, 6)), await quantities(node)]


def kubelet_restarts(kill: bool, damage: Damage | None = None) -> Callable[[AnyNode], Awaitable[Seen]]:
    async def run(node: AnyNode) -> Seen:
        kubelet = node.kubelet
        seen: Seen = [await admitted(node, "a", ("main", CY, 3))]
        await kubelet.stop(kill)
        if damage is not None:
            kubelet.damage_checkpoint(damage)
        await kubelet.start()
        await node.settled({CY: 4})
        seen += [*await quantities(node), sorted(await kubelet.devices_of("a"))]
        seen += [await admitted(node, "b", ("main", CY, 1)), *await quantities(node)]
        await kubelet.free("a")
        return [*seen, *await quantities(node), await admitted(node, "c", ("main", CY, 3))]

    return run


def server_ends(how: signal.Signals) -> Callable[[AnyNode], Awaitable[Seen]]:
    async def run(node: AnyNode) -> Seen:
        seen: Seen = [await admitted(node, "a", ("main", CY, 2))]
        await node.stop_server(how)
        await node.wait({CY: 0})
        seen += [*await quantities(node), await admitted(node, "b", ("main", CY, 1))]
        seen += [await admitted(node, "a", ("main", CY, 2)), sorted(await node.kubelet.devices_of("a"))]
        await node.kubelet.restart(kill=True)
        seen += await quantities(node)
        await node.start_again({CY: 4})
        await node.settled({CY: 4})
        return [*seen, *await quantities(node), await admitted(node, "c", ("main", CY, 2))]

    return run


async def a_pods_vf_vanishes(node: AnyNode) -> Seen:
    await node.until_bound()
    kubelet = node.kubelet
    seen: Seen = [await admitted(node, "a", ("main", GENERIC, 2))]
    gone = min(await kubelet.devices_of("a"))
    node.kernel.remove(gone)
    await node.wait({GENERIC: 3})
    seen += [*await quantities(node), await admitted(node, "b", ("main", GENERIC, 3))]
    seen += [sorted(await kubelet.devices_of("a")), await admitted(node, "c", ("main", GENERIC, 1))]
    node.kernel.rescan()
    await node.wait({GENERIC: 4})
    return [*seen, *await quantities(node), await admitted(node, "a", ("main", GENERIC, 2))]


async def a_pods_vf_vanishes_without_a_server(node: AnyNode) -> Seen:
    await node.until_bound()
    seen: Seen = [await admitted(node, "a", ("main", GENERIC, 1))]
    await node.stop_server(signal.SIGKILL)
    node.kernel.unplug(min(await node.kubelet.devices_of("a")))
    await node.start_again({GENERIC: 3})
    await node.settled({GENERIC: 3})
    return [*seen, *await quantities(node), await admitted(node, "a", ("main", GENERIC, 1)), await quantities(node)]


def a_pods_vf_vanishes_without_anybody(kill: bool) -> Callable[[AnyNode], Awaitable[Seen]]:
    """The server is started first, so that it has to wait for the kubelet to say what pods hold."""

    async def run(node: AnyNode) -> Seen:
        await node.until_bound()
        seen: Seen = [await admitted(node, "a", ("main", GENERIC, 1))]
        held = min(await node.kubelet.devices_of("a"))
        await node.stop_server(signal.SIGKILL)
        await node.kubelet.stop(kill)
        node.kernel.unplug(held)
        node.start_server()
        await node.until_status("the server has looked", lambda status: len(status.vfs) == 3)
        await node.kubelet.start()
        await node.settled({GENERIC: 3})
        seen += [*await quantities(node), await admitted(node, "a", ("main", GENERIC, 1)), await quantities(node)]
        return [*seen, sorted(await node.kubelet.devices_of("a"))]

    return run


async def nothing_is_healthy(node: AnyNode) -> Seen:
    await admitted(node, "a", ("main", CY, 1))
    node.kernel.set_heartbeat(ONE_PF.pfs[0].address, -1)
    await node.wait({CY: 0})
    seen = [*await quantities(node), await admitted(node, "b", ("main", CY, 1))]
    return [*seen, await admitted(node, "a", ("main", CY, 1)), await quantities(node)]


async def rolling_update(node: AnyNode) -> Seen:
    seen: Seen = [await admitted(node, "a", ("main", CY, 2))]
    old = await node.replace_server()
    old.send_signal(signal.SIGTERM)
    await asyncio.to_thread(old.wait, 60)
    await node.until_status("the new server is registered", lambda status: status.ready)
    await node.settled({CY: 4})
    return [*seen, *await quantities(node), await admitted(node, "b", ("main", CY, 2))]


SCENARIOS: Final = {
    "every resource": Scenario(EVERY_RESOURCE, EVERY_ALLOCATABLE, all_resources, options=EVERY_DRIVER),
    **{
        f"pod after pod, {policy}, {ours or 'none'}": Scenario(
            TWO_NODES, {CY: 12}, one_after_the_other, policy, (f"--allocation-policy={ours}",) if ours else ()
        )
        for policy, ours in zip(TopologyPolicy, ("", "balanced", "packed", "balanced"), strict=True)
    },
    **{
        f"too much for one NUMA node, {policy}": Scenario(TWO_NODES, {CY: 12}, too_much_for_one_numa_node, policy)
        for policy in TopologyPolicy
    },
    "more than there is": Scenario(TWO_NODES, {CY: 12}, more_than_there_is),
    "kubelet stopped": Scenario(ONE_PF, {CY: 4}, kubelet_restarts(kill=False)),
    "kubelet killed": Scenario(ONE_PF, {CY: 4}, kubelet_restarts(kill=True), TopologyPolicy.RESTRICTED),
    "kubelet killed, watched": Scenario(ONE_PF, {CY: 4}, kubelet_restarts(kill=True), registration=WATCHED),
    **{
        f"checkpoint damaged: {damage}": Scenario(ONE_PF, {CY: 4}, kubelet_restarts(kill=True, damage=damage))
        for damage in get_args(Damage)
    },
    "server stopped": Scenario(ONE_PF, {CY: 4}, server_ends(signal.SIGTERM)),
    "server killed": Scenario(ONE_PF, {CY: 4}, server_ends(signal.SIGKILL), TopologyPolicy.NONE),
    "server killed, watched": Scenario(ONE_PF, {CY: 4}, server_ends(signal.SIGKILL), registration=WATCHED),
    "a pod's VF vanishes": Scenario(LONE, {GENERIC: 4}, a_pods_vf_vanishes, TopologyPolicy.NONE),
    "a pod's VF vanishes, aligned": Scenario(LONE, {GENERIC: 4}, a_pods_vf_vanishes, TopologyPolicy.RESTRICTED),
    "a pod's VF vanishes while no server runs": Scenario(
        LONE, {GENERIC: 4}, a_pods_vf_vanishes_without_a_server, TopologyPolicy.RESTRICTED
    ),
    **{
        f"a pod's VF vanishes while nobody runs, {registration}, kubelet {'killed' if kill else 'stopped'}": Scenario(
            LONE,
            {GENERIC: 4},
            a_pods_vf_vanishes_without_anybody(kill),
            TopologyPolicy.RESTRICTED,
            registration=registration,
        )
        for registration in Registration
        for kill in (False, True)
    },
    "nothing is healthy": Scenario(ONE_PF, {CY: 4}, nothing_is_healthy, options=("--health-interval=50ms",)),
    "rolling update": Scenario(ONE_PF, {CY: 4}, rolling_update),
    "rolling update, watched": Scenario(ONE_PF, {CY: 4}, rolling_update, registration=WATCHED),
}
"""Failing here means that the emulated kubelet is wrong: the real one is right by definition."""
