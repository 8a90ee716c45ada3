"""Which devices are listed to the kubelet, from the previous listing, the inventory and what pods hold.

A VF is served if it is on the wanted driver and has the device nodes that a pod needs. Once listed, it stays listed:
if it disappears or becomes unusable, it is Unhealthy, with a reason and its last nodes, until it is `releasable`. A
device that a pod holds is listed even if this server has never seen it: it may have been removed while no server ran.

Two VFs in one IOMMU group: a group has one user (VFIO refuses a second), and that user reaches all devices in the
group. So only one VF of a group is served: the one that is already listed, or else the first in address order. The
kernel does not let a group be used while another of its devices is on another driver; then none of its VFs is served.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

from msgspec.structs import replace

from qat_server.devices.inventory import Inventory, VirtualFunction
from qat_server.devices.naming import is_resource_name
from qat_server.kubelet.device import Device, Holder, Listing
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress

_VFIO_CONTAINER: Final = "/dev/vfio/vfio"


class PodDevices(Protocol):
    """Which devices pods hold or may hold, each through one resource. A device that may be held is not releasable."""

    @property
    def holders(self) -> Mapping[str, Mapping[PciAddress, Holder]] | None:
        """Resource to the devices that pods are known to hold through it, None if that is unknown."""

    def may_be_held(self, resource: str, address: PciAddress) -> bool:
        """Whether a pod holds the device through the resource, or may hold it."""

    def releasable(self, resource: str, address: PciAddress) -> bool:
        """Whether no pod holds the device through the resource, nor is about to get it."""


def next_listing(
    previous: Listing,
    inventory: Inventory,
    names: Mapping[PciAddress, str],
    unhealthy: Mapping[PciAddress, str],
    driver: DpdkDriver,
    pods: PodDevices,
) -> Listing:
    """The next Listing.

    `names`: VF to resource; a VF without one is not served. `unhealthy`: PF or VF to the reason why it is unhealthy.
    A VF whose resource has changed is Unhealthy in the old one. In the new one it becomes Healthy once it cannot be
    held through the old one.
    """
    before = {name: {device.address: device for device in devices} for name, devices in previous.items()}
    for resource, held in (pods.holders or {}).items():
        if is_resource_name(resource):  # else it belongs to another plugin that ran before this one
            listed = before.setdefault(resource, {})
            for address, holder in held.items():
                listed.setdefault(address, Device(address, None, holder.numa_node, (), (), reason="it is gone"))
    refused = refusals(inventory, driver, {address for devices in before.values() for address in devices})
    after: defaultdict[str, dict[PciAddress, Device]] = defaultdict(dict)
    for vf in inventory.vfs:
        name = names.get(vf.address)
        if name is None or vf.address in refused:
            continue
        reason = unhealthy.get(vf.address, "") or (unhealthy.get(vf.pf, "") if vf.pf is not None else "")
        for other, devices in before.items():
            if not reason and other != name and vf.address in devices and pods.may_be_held(other, vf.address):
                reason = f"a pod may hold it as {other}"
        after[name][vf.address] = _device(vf, driver, reason)
    reasons: dict[PciAddress, str] | None = None
    for name, devices in before.items():
        for address, device in devices.items():
            if address in after[name] or pods.releasable(name, address):
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
    """The VFs that cannot be served in their present state, with the reason. `listed`: the devices already listed."""
    groups: defaultdict[int | None, list[VirtualFunction]] = defaultdict(list)
    for vf in inventory.vfs:
        groups[vf.iommu_group].append(vf)
    reasons = {}
    for vf in inventory.vfs:
        if vf.driver is None:
            reason = "it has no driver"
        elif vf.driver != driver:
            reason = f"it is on driver {vf.driver}, not on {driver}"
        elif driver == DpdkDriver.IGB_UIO:
            reason = "it has no uio device" if vf.uio is None else ""
        elif vf.iommu_group is None:
            reason = "it has no IOMMU group"
        else:
            reason = _sharing_problem(vf, groups[vf.iommu_group], listed)
        if reason:
            reasons[vf.address] = reason
    return reasons


def _sharing_problem(vf: VirtualFunction, group: Sequence[VirtualFunction], listed: Collection[PciAddress]) -> str:
    if len(group) == 1:
        return ""
    for other in group:
        if other.driver not in (None, vf.driver):
            return f"it shares IOMMU group {vf.iommu_group} with {other.address}, which is on driver {other.driver}"
    user = min(
        (other.address for other in group if other.driver == vf.driver),
        key=lambda address: (address not in listed, address),
    )
    if user == vf.address:
        return ""
    return f"it shares IOMMU group {vf.iommu_group} with {user}, and a group can have only one user"


def _device(vf: VirtualFunction, driver: DpdkDriver, reason: str) -> Device:
    if driver == DpdkDriver.IGB_UIO:
        mounts = (f"/sys/class/uio/{vf.uio}/device",)
        return Device(vf.address, vf.pf, vf.numa_node, (f"/dev/{vf.uio}",), mounts, reason)
    group = f"/dev/vfio/{'noiommu-' if vf.noiommu else ''}{vf.iommu_group}"
    return Device(vf.address, vf.pf, vf.numa_node, (group, _VFIO_CONTAINER), (), reason)


def _reasons(
    inventory: Inventory, names: Mapping[PciAddress, str], refused: Mapping[PciAddress, str]
) -> dict[PciAddress, str]:
    """Why a VF is not, or is no longer, served in the resource where it was listed."""
    reasons = {problem.address: problem.text for problem in inventory.problems if problem.address is not None}
    reasons.update(dict.fromkeys(inventory.cut, "it exceeds the maximum number of devices"))
    for vf in inventory.vfs:
        name = names.get(vf.address)
        reasons[vf.address] = refused.get(vf.address) or (
            f"it is now served as {name}" if name is not None else "its PF's services are not known"
        )
    return reasons
