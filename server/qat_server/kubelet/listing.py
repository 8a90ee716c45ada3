"""What the kubelet is told: from what it was told before, what there is now, and what may be dropped.

A VF is served when it is on the wanted driver and has the device nodes that a pod needs. Once listed it stays listed:
when it goes away or bad it is Unhealthy, with a reason and its last nodes, until `releasable` says that nobody can have
it. What a pod holds is listed even if this server has never seen it: it may have vanished while no server was there.

Two VFs in one IOMMU group: a group has one user (VFIO refuses a second), and whoever has the group reaches all devices
in it. So one VF of a group is served: the one that is listed already, or else the first in address order. And only
while the kernel lets the group be used at all, which it does not while another of its devices is on another driver.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from qat_server.devices.inventory import Inventory, VirtualFunction
from qat_server.devices.naming import is_resource_name
from qat_server.kubelet.device import Device, Holder, Listing
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress

_VFIO_CONTAINER: Final = "/dev/vfio/vfio"


def next_listing(
    previous: Listing,
    inventory: Inventory,
    names: Mapping[PciAddress, str],
    unhealthy: Mapping[PciAddress, str],
    driver: DpdkDriver,
    releasable: Callable[[str, PciAddress], bool],
    held: Callable[[str, PciAddress], bool] | None = None,
    holders: Mapping[str, Mapping[PciAddress, Holder]] | None = None,
) -> Listing:
    """The next Listing. `names`: VF to resource, a VF without one is not served. `unhealthy`: PF or VF to why it is.

    `releasable(resource, address)`: nobody has the device through this resource, nor is about to.
    A VF whose resource has changed is Unhealthy in the old one. In the new one it is healthy once nobody has it through
    the old one: when it is not `held(old, address)`; without `held`, when it is releasable there.
    `holders`: resource to the devices that pods are known to have through it.
    """
    before = {name: {device.address: device for device in devices} for name, devices in previous.items()}
    for resource, held_by in (holders or {}).items():
        if is_resource_name(resource):  # else another plugin's, from before this one
            listed = before.setdefault(resource, {})
            for address, holder in held_by.items():
                listed.setdefault(address, Device(address, None, holder.numa_node, (), (), reason="it is gone"))
    refused = refusals(inventory, driver, {address for devices in before.values() for address in devices})
    after: defaultdict[str, dict[PciAddress, Device]] = defaultdict(dict)
    for vf in inventory.vfs:
        name = names.get(vf.address)
        if name is None or vf.address in refused:
            continue
        reason = unhealthy.get(vf.address, "") or (unhealthy.get(vf.pf, "") if vf.pf is not None else "")
        for other, devices in before.items():
            if reason or other == name or vf.address not in devices:
                continue
            if not releasable(other, vf.address) and (held is None or held(other, vf.address)):
                reason = f"a pod may have it as {other}"
        after[name][vf.address] = _device(vf, driver, reason)
    reasons: dict[PciAddress, str] | None = None
    for name, devices in before.items():
        for address, device in devices.items():
            if address in after[name] or releasable(name, address):
                continue
            if reasons is None:
                reasons = _reasons(inventory, names, refused)
            after[name][address] = replace(device, reason=reasons.get(address, "it is gone"))
    return {
        name: tuple(device for _, device in sorted(devices.items()))
        for name, devices in sorted(after.items())
        if devices
    }


def refusals(inventory: Inventory, driver: DpdkDriver, listed: Collection[PciAddress] = ()) -> dict[PciAddress, str]:
    """The VFs that cannot be served as they are, each with the reason. `listed`: those that are listed already."""
    groups: defaultdict[int | None, list[VirtualFunction]] = defaultdict(list)
    for vf in inventory.vfs:
        groups[vf.iommu_group].append(vf)
    reasons = {}
    for vf in inventory.vfs:
        if vf.driver is None:
            reason = "it is on no driver"
        elif vf.driver != driver:
            reason = f"it is on driver {vf.driver}, not on {driver}"
        elif driver == DpdkDriver.IGB_UIO:
            reason = "it has no uio device" if vf.uio is None else ""
        elif vf.iommu_group is None:
            reason = "it has no IOMMU group"
        else:
            reason = _sharing(vf, groups[vf.iommu_group], listed)
        if reason:
            reasons[vf.address] = reason
    return reasons


def _sharing(vf: VirtualFunction, group: Sequence[VirtualFunction], listed: Collection[PciAddress]) -> str:
    if len(group) == 1:
        return ""
    for other in group:
        if other.driver not in (None, vf.driver):
            return (
                f"its IOMMU group {vf.iommu_group} is also that of {other.address}, which is on driver {other.driver}"
            )
    user = min(
        (other.address for other in group if other.driver == vf.driver),
        key=lambda address: (address not in listed, address),
    )
    if user == vf.address:
        return ""
    return f"its IOMMU group {vf.iommu_group} is also that of {user}, and can have one user only"


def _device(vf: VirtualFunction, driver: DpdkDriver, reason: str) -> Device:
    if driver == DpdkDriver.IGB_UIO:
        mounts = (f"/sys/class/uio/{vf.uio}/device",)
        return Device(vf.address, vf.pf, vf.numa_node, (f"/dev/{vf.uio}",), mounts, reason)
    group = f"/dev/vfio/{'noiommu-' if vf.noiommu else ''}{vf.iommu_group}"
    return Device(vf.address, vf.pf, vf.numa_node, (group, _VFIO_CONTAINER), (), reason)


def _reasons(
    inventory: Inventory, names: Mapping[PciAddress, str], refused: Mapping[PciAddress, str]
) -> dict[PciAddress, str]:
    """Why a VF is not (or no more) in the resource where it was listed."""
    reasons = {problem.address: problem.text for problem in inventory.problems if problem.address is not None}
    reasons.update(dict.fromkeys(inventory.cut, "it is beyond the largest number of devices"))
    for vf in inventory.vfs:
        name = names.get(vf.address)
        reasons[vf.address] = refused.get(vf.address) or (
            f"it is served as {name} now" if name is not None else "its PF's services are not known"
        )
    return reasons
