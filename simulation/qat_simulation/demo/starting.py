"""The demo's first steps: the node, the processes, provisioning, binding, registering."""

import json
import os
import time
from collections.abc import Iterator
from typing import Final

from qat_server.command_line import tables
from qat_server.observability.status import Status
from qat_shared import NAMESPACE
from qat_shared.devices import PHYSICAL
from qat_shared.pci import PciAddress
from qat_simulation.demo.groups import DRIVER, Groups, groups_of, spans
from qat_simulation.demo.scene import Scene
from qat_simulation.node.description import NodeError, Pf
from qat_simulation.running_node import SimulationError

_GRACE: Final = 1.5  # seconds: what has failed is tried again by then, and may succeed


def show_node(scene: Scene) -> None:
    """Say what the node has. Raises NodeError when there is nothing on it to show."""
    node, devices = scene.node, scene.node.kernel.snapshot()
    scene.console.print(
        f"A node without hardware in {node.directory}: its kernel and its kubelet are emulated;"
        f" [bold]qat-helper[/bold] and [bold]qat-plugin[/bold] are real (here both as uid {os.geteuid()})."
    )
    if scene.description.pfs:
        columns = ("PF", "device", "driver", "NUMA", "state", "services", "VFs", "VFs' driver")
        tables.show(scene.console, "", columns, _pfs(scene))
    if scene.description.vfs:
        lone = [
            (
                vf.address,
                f"8086:{vf.device}",
                devices[PciAddress.parse(vf.address)].driver or "none",
                _numa(vf.numa_node),
            )
            for vf in scene.description.vfs
        ]
        tables.show(scene.console, "", ("VF without PF", "device", "driver", "NUMA"), lone)
    scene.bare = frozenset(pf.address for pf in _bare(scene))
    if not scene.description.vfs and not any(device.pf for device in devices.values()) and not scene.bare:
        raise NodeError(
            "the node has no VF, and no PF on which the plugin could enable any: there is nothing to show"
            " (docs/simulation.md has the keys of a node description)"
        )


async def start(scene: Scene) -> None:
    """Start both processes."""
    node = scene.node
    async with scene.step("helper and server started"):
        node.start_helper()
        node.start_server()
        status = await node.until_status("the server reaches the helper", lambda status: status.helper.connected)
    assert node.helper is not None  # noqa: S101
    assert node.server is not None  # noqa: S101
    scene.say(
        f"helper pid {node.helper.pid} (root on a real node), server pid {node.server.pid} (not root there),"
        f" version {status.version}"
    )


async def provision(scene: Scene) -> None:
    """PFs that have no VFs get them, as the configuration wants."""
    bare = scene.bare
    if not bare:
        return
    failed_since: float | None = None

    def ended(status: Status) -> bool:
        nonlocal failed_since
        stages = {each.pf: each.stage for each in status.provisioning if each.pf in bare}
        if stages.keys() != bare or not set(stages.values()) <= {"done", "failed", "impossible"}:
            failed_since = None
            return False
        if set(stages.values()) == {"done"}:
            return True
        failed_since = failed_since or time.monotonic()
        return time.monotonic() - failed_since > _GRACE

    scene.now = "VFs enabled by the helper"
    with scene.console.status(f"{scene.now} ..."):
        began = time.monotonic()
        status = await scene.node.until_status("the VFs are there, or it is said why not", ended)
    told = {each.pf: each for each in status.provisioning}
    done = sorted(pf for pf in bare if told[pf].stage == "done")
    for pf in done:
        path = scene.node.kernel.sysfs_root / "bus/pci/devices" / pf / "sriov_drivers_autoprobe"
        if path.read_text() != "0\n":
            raise SimulationError(f"the VFs of {pf} went through the kernel's VF driver")
    if done:
        scene.saw(
            f"PF {', '.join(done)}: VFs enabled by the helper, as qat.conf wants",
            f"({(time.monotonic() - began) * 1000:.0f} ms)",
        )
        scene.say("without the kernel's VF driver in between (sriov_drivers_autoprobe is 0)")
    for pf in sorted(bare.difference(done)):
        scene.trouble(f"PF {pf}: its VFs could not be enabled", [told[pf].reason])


async def bind(scene: Scene) -> Groups:
    """Each VF is bound, or it is known why not. What is served is in the answer."""
    node, groups = scene.node, Groups()
    failed_since: float | None = None

    def decided(status: Status) -> bool:
        nonlocal failed_since, groups
        groups = groups_of(status, scene.description, node.kernel.snapshot())
        if not status.ready or groups.undecided or not groups.total or not _sick_are_known(scene, status):
            failed_since = None
            return False
        if not groups.failed:
            return True
        failed_since = failed_since or time.monotonic()
        return time.monotonic() - failed_since > _GRACE

    if not any(device.pf for device in node.kernel.snapshot().values()) and not scene.description.vfs:
        return groups  # none could be enabled: that was said
    scene.now = f"VFs bound to {DRIVER}"
    began = time.monotonic()
    with scene.console.status(f"{scene.now} ..."):
        try:
            await node.until_status("each VF is bound, or it is said why not", decided)
        except SimulationError as error:
            raise SimulationError(
                f"{spans(groups.undecided) or 'the VFs'}: nothing has become of them: {error}"
            ) from None
    by_helper = _bound_by_helper(scene).intersection(groups.served)
    if len(by_helper) < groups.total or not groups.total:
        title = _told(groups, len(by_helper))
    else:
        title = f"every VF ({groups.total}) bound to {DRIVER} by the helper"
    if groups.total > len(groups.failed):
        scene.saw(title, f"({(time.monotonic() - began) * 1000:.0f} ms)")
        _show_by_pf(scene, groups)
    if groups.failed:
        scene.trouble(f"{len(groups.failed)} of {groups.total} VFs could not be bound to {DRIVER}", groups.failures())
    return groups


async def register(scene: Scene) -> None:
    """The kubelet knows what the server lists."""
    node = scene.node
    status = await node.status()
    if not status.resources:
        scene.skip("no VF is served: there is nothing to register, to allocate or to lose")
        return

    def told(status: Status) -> bool:
        wanted = {f"{NAMESPACE}/{resource.name}": resource.allocatable for resource in status.resources}
        return node.kubelet.allocatable() == wanted

    async with scene.step("resources registered with the kubelet"):
        await node.until_status("the kubelet knows the resources", told)
    scene.show_capacity()
    for pf in (await node.status()).pfs:
        vfs = [vf for vf in status.vfs if vf.pf == pf.address and vf.listed]
        if pf.reason and vfs:
            scene.saw(f"PF {pf.address} is not well: its VFs ({len(vfs)}) are Unhealthy")
            scene.say(pf.reason)


def _pfs(scene: Scene) -> Iterator[tuple[str, ...]]:
    devices = scene.node.kernel.snapshot()
    for pf in scene.description.pfs:
        vfs = [device for device in devices.values() if device.pf == pf.pci_address]
        yield (
            pf.address,
            f"8086:{pf.device}",
            devices[pf.pci_address].driver or "none",
            _numa(pf.numa_node),
            pf.state if pf.has_qat_attributes else "-",
            pf.services or "-",
            f"{len(vfs)} of {pf.total_vfs}",
            ", ".join(sorted({vf.driver or "none" for vf in vfs})) or "-",
        )


def _numa(number: int | None) -> str:
    return "-" if number is None else str(number)


def _bare(scene: Scene) -> list[Pf]:
    """PFs without VFs on which the plugin enables them."""
    devices = scene.node.kernel.snapshot()
    used = {device.pf for device in devices.values()}
    return [
        pf
        for pf in scene.description.pfs
        if pf.total_vfs
        and PHYSICAL[pf.device_id].provisioned
        and pf.pci_address not in used
        and devices[pf.pci_address].driver == pf.kernel_driver
    ]


def _sick_are_known(scene: Scene, status: Status) -> bool:
    """Whether the server knows of each firmware that does not answer, as it is described, from the start."""
    sick = {pf.address for pf in scene.description.pfs if pf.heartbeat}
    return all(pf.reason or not pf.vfs for pf in status.pfs if pf.address in sick)


def _bound_by_helper(scene: Scene) -> set[str]:
    records = map(json.loads, scene.node.audit_log.read_bytes().splitlines())
    return {
        record["arguments"]["address"]
        for record in records
        if (record["event"], record.get("operation"), record.get("verdict")) == ("done", "BindDriver", "ok")
    }


def _told(groups: Groups, by_helper: int) -> str:
    parts = []
    if by_helper:
        parts.append(f"{by_helper} of {groups.total} VFs bound to {DRIVER} by the helper")
    if already := len(groups.served) - by_helper:
        parts.append(f"{already} of {groups.total} VFs on {DRIVER} already")
    if groups.cut:
        parts.append(f"{len(groups.cut)} beyond --max-num-devices left alone")
    for driver in sorted(set(groups.foreign.values())):
        parts.append(f"{list(groups.foreign.values()).count(driver)} on {driver} left alone")
    if groups.unseen:
        parts.append(f"{len(groups.unseen)} left alone whose PF is not on its kernel driver")
    if groups.failed:
        parts.append(f"{len(groups.failed)} not bound")
    return "; ".join(parts)


def _show_by_pf(scene: Scene, groups: Groups) -> None:
    devices = scene.node.kernel.snapshot()
    names = {vf: str(state.pf or "") for address, state in devices.items() for vf in [str(address)]}
    kinds = (
        (f"on {DRIVER}", groups.served),
        ("left alone", tuple(groups.foreign)),
        ("beyond --max-num-devices", groups.cut),
        ("not looked at", groups.unseen),
    )
    for pf in sorted({names[vf] for _, vfs in kinds for vf in vfs}):
        for kind, vfs in kinds:
            own = [vf for vf in vfs if names[vf] == pf]
            if own:
                scene.say(f"{f'PF {pf}' if pf else 'without PF'} {kind}: {spans(own)}")
