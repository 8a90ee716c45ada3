"""The demo's beginning: the node is shown, then the first steps: processes, provisioning, binding, registering."""

import json
import os
import time
from collections.abc import Iterator
from typing import Final

from qat_server.command_line import tables
from qat_server.observability.status_format import Status
from qat_shared import NAMESPACE
from qat_shared.devices import PHYSICAL
from qat_shared.pci import PciAddress
from qat_simulation.demo.demo_run import DemoRun
from qat_simulation.demo.vf_outcomes import DRIVER, VfOutcomes, outcomes, summary
from qat_simulation.node.description import NodeError, Pf
from qat_simulation.running_node import SimulationError

_RETRY_TIME: Final = 1.5  # seconds in which the server retries after a failure, and may succeed


class _Settled:
    """Whether nothing is pending, and failures (if any) have lasted longer than the server's retries."""

    def __init__(self) -> None:
        self._failed_since: float | None = None

    def __call__(self, *, pending: bool, failed: bool) -> bool:
        if pending or not failed:
            self._failed_since = None
            return not pending
        self._failed_since = self._failed_since or time.monotonic()
        return time.monotonic() - self._failed_since > _RETRY_TIME


def show_node(demo: DemoRun) -> None:
    """Print the node's devices. Raises NodeError if no VF exists and the plugin can enable none."""
    node, devices = demo.node, demo.node.kernel.snapshot()
    demo.console.print(
        f"A node without hardware in {node.directory}: its kernel and its kubelet are emulated;"
        f" [bold]qat-helper[/bold] and [bold]qat-plugin[/bold] are real (here both as uid {os.geteuid()})."
    )
    if demo.description.pfs:
        columns = ("PF", "device", "driver", "NUMA", "state", "services", "VFs", "VFs' driver")
        tables.show(demo.console, "", columns, _pfs(demo))
    if demo.description.vfs:
        lone = [
            (
                vf.address,
                f"8086:{vf.device}",
                devices[PciAddress.parse(vf.address)].driver or "none",
                _numa(vf.numa_node),
            )
            for vf in demo.description.vfs
        ]
        tables.show(demo.console, "", ("VF without PF", "device", "driver", "NUMA"), lone)
    demo.pfs_without_vfs = frozenset(pf.address for pf in _pfs_to_provision(demo))
    if not demo.description.vfs and not any(device.pf for device in devices.values()) and not demo.pfs_without_vfs:
        raise NodeError(
            "the node has no VF, and no PF on which the plugin could enable any: there is nothing to show"
            " (docs/simulation.md has the keys of a node description)"
        )


async def start(demo: DemoRun) -> None:
    """Start both processes."""
    node = demo.node
    async with demo.step("helper and server started"):
        node.start_helper()
        node.start_server()
        status = await node.until_status("the server reaches the helper", lambda status: status.helper.connected)
    assert node.helper is not None  # noqa: S101
    assert node.server is not None  # noqa: S101
    demo.detail(
        f"helper pid {node.helper.pid} (root on a real node), server pid {node.server.pid} (not root there),"
        f" version {status.version}"
    )


async def provision(demo: DemoRun) -> None:
    """Wait until the PFs without VFs have them, as configured."""
    pfs = demo.pfs_without_vfs
    if not pfs:
        return
    settled = _Settled()

    def finished(status: Status) -> bool:
        stages = {each.pf: each.stage for each in status.provisioning if each.pf in pfs}
        found = set(stages.values())
        pending = stages.keys() != pfs or not found <= {"done", "failed", "impossible"}
        return settled(pending=pending, failed=found != {"done"})

    demo.current = "VFs enabled by the helper"
    with demo.console.status(f"{demo.current} ..."):
        began = time.monotonic()
        status = await demo.node.until_status("the VFs exist, or the server reports a reason", finished)
    by_pf = {each.pf: each for each in status.provisioning}
    done = sorted(pf for pf in pfs if by_pf[pf].stage == "done")
    for pf in done:
        path = demo.node.kernel.sysfs_root / "bus/pci/devices" / pf / "sriov_drivers_autoprobe"
        if path.read_text() != "0\n":
            raise SimulationError(f"the VFs of {pf} were offered to the kernel's VF driver")
    if done:
        demo.success(
            f"PF {', '.join(done)}: VFs enabled by the helper, as configured in qat.conf", time.monotonic() - began
        )
        demo.detail("the kernel's VF driver was not bound to them first (sriov_drivers_autoprobe is 0)")
    for pf in sorted(pfs.difference(done)):
        demo.failure(f"PF {pf}: its VFs could not be enabled", [by_pf[pf].reason])


async def bind(demo: DemoRun) -> None:
    """Wait until each VF is bound, or the server reports why not."""
    node, found, settled = demo.node, VfOutcomes(), _Settled()

    def decided(status: Status) -> bool:
        nonlocal found
        found = outcomes(status, demo.description, node.kernel.snapshot())
        pending = found.pending or not found.total or not status.ready or not _failed_pfs_are_known(demo, status)
        return settled(pending=bool(pending), failed=bool(found.failed))

    if not any(device.pf for device in node.kernel.snapshot().values()) and not demo.description.vfs:
        return  # no VF could be enabled: `provision` has reported it
    demo.current = f"VFs bound to {DRIVER}"
    began = time.monotonic()
    with demo.console.status(f"{demo.current} ..."):
        try:
            await node.until_status("each VF is bound, or the server reports a reason", decided)
        except SimulationError as error:
            raise SimulationError(f"{summary(found.pending) or 'the VFs'}: still pending: {error}") from None
    by_helper = _bound_by_helper(demo).intersection(found.served)
    if found.total > len(found.failed):
        demo.success(_title(found, len(by_helper)), time.monotonic() - began)
        _show_by_pf(demo, found)
    if found.failed:
        demo.failure(f"{len(found.failed)} of {found.total} VFs could not be bound to {DRIVER}", found.failures())


async def register(demo: DemoRun) -> None:
    """Wait until the kubelet has the resources that the server lists."""
    node = demo.node
    status = await node.status()
    if not status.resources:
        demo.skip("no VF is served: no resource can be registered or allocated")
        return

    def registered(status: Status) -> bool:
        wanted = {f"{NAMESPACE}/{resource.name}": resource.allocatable for resource in status.resources}
        return node.kubelet.allocatable() == wanted

    async with demo.step("resources registered with the kubelet"):
        await node.until_status("the kubelet has the resources", registered)
    demo.show_capacity()
    for pf in (await node.status()).pfs:
        vfs = [vf for vf in status.vfs if vf.pf == pf.address and vf.listed]
        if pf.reason and vfs:
            demo.success(f"PF {pf.address} is not healthy: its VFs ({len(vfs)}) are Unhealthy")
            demo.detail(pf.reason)


def _pfs(demo: DemoRun) -> Iterator[tuple[str, ...]]:
    devices = demo.node.kernel.snapshot()
    for pf in demo.description.pfs:
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


def _pfs_to_provision(demo: DemoRun) -> list[Pf]:
    """PFs without VFs on which the plugin enables them."""
    devices = demo.node.kernel.snapshot()
    with_vfs = {device.pf for device in devices.values()}
    return [
        pf
        for pf in demo.description.pfs
        if pf.total_vfs
        and PHYSICAL[pf.device_id].provisioned
        and pf.pci_address not in with_vfs
        and devices[pf.pci_address].driver == pf.kernel_driver
    ]


def _failed_pfs_are_known(demo: DemoRun, status: Status) -> bool:
    """Whether the server has detected each PF whose firmware is described as not answering."""
    failed = {pf.address for pf in demo.description.pfs if pf.heartbeat}
    return all(pf.reason or not pf.vfs for pf in status.pfs if pf.address in failed)


def _bound_by_helper(demo: DemoRun) -> set[str]:
    records = map(json.loads, demo.node.audit_log.read_bytes().splitlines())
    return {
        record["arguments"]["address"]
        for record in records
        if (record["event"], record.get("operation"), record.get("verdict")) == ("done", "BindDriver", "ok")
    }


def _title(groups: VfOutcomes, by_helper: int) -> str:
    if by_helper == groups.total:
        return f"every VF ({groups.total}) bound to {DRIVER} by the helper"
    parts = []
    if by_helper:
        parts.append(f"{by_helper} of {groups.total} VFs bound to {DRIVER} by the helper")
    if already := len(groups.served) - by_helper:
        parts.append(f"{already} of {groups.total} VFs on {DRIVER} already")
    if groups.over_limit:
        parts.append(f"{len(groups.over_limit)} beyond --max-num-devices left alone")
    for driver in sorted(set(groups.other_driver.values())):
        parts.append(f"{list(groups.other_driver.values()).count(driver)} on {driver} left alone")
    if groups.ignored:
        parts.append(f"{len(groups.ignored)} left alone whose PF is not on its kernel driver")
    if groups.failed:
        parts.append(f"{len(groups.failed)} not bound")
    return "; ".join(parts)


def _show_by_pf(demo: DemoRun, groups: VfOutcomes) -> None:
    devices = demo.node.kernel.snapshot()
    names = {vf: str(state.pf or "") for address, state in devices.items() for vf in [str(address)]}
    kinds = (
        (f"on {DRIVER}", groups.served),
        ("left alone", tuple(groups.other_driver)),
        ("beyond --max-num-devices", groups.over_limit),
        ("ignored", groups.ignored),
    )
    for pf in sorted({names[vf] for _, vfs in kinds for vf in vfs}):
        for kind, vfs in kinds:
            own = [vf for vf in vfs if names[vf] == pf]
            if own:
                demo.detail(f"{f'PF {pf}' if pf else 'without PF'} {kind}: {summary(own)}")
