"""What the kubelet is told: each resource's devices, from what there is now and what the kubelet was told before. Pure.

The rule that shapes it: a device that was listed stays listed, as Unhealthy with a reason, until it cannot be in use.
The kubelet can crash over a device that it has allocated, or is about to, and that is no longer listed.
"""

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from qat_server.inventory import Device, Inventory, Listing, VirtualFunction
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress

_VFIO: Final = "/dev/vfio"


def advance(
    previous: Listing,
    inventory: Inventory,
    names: Mapping[PciAddress, str],
    unhealthy: Mapping[PciAddress, str],
    driver: DpdkDriver,
    releasable: Callable[[str, PciAddress], bool],
) -> Listing:
    """The next listing. `names`: resource by VF; `unhealthy`: reason by PF; `releasable(resource, VF)`: may it leave."""
    listing: dict[str, dict[PciAddress, Device]] = {}
    vfs = {vf.address: vf for vf in inventory.vfs}
    for vf in inventory.vfs:
        device = _device(vf, driver, unhealthy.get(vf.pf, "") if vf.pf else "")
        if device is not None:
            listing.setdefault(names[vf.address], {})[vf.address] = device
    for resource, devices in previous.items():
        current = listing.setdefault(resource, {})
        for device in devices:
            if device.address in current or releasable(resource, device.address):
                continue
            reason = _why_gone(device, vfs.get(device.address), inventory, names, driver)
            current[device.address] = msgspec.structs.replace(device, reason=reason)
    return {
        resource: tuple(device for _, device in sorted(devices.items()))
        for resource, devices in sorted(listing.items())
        if devices
    }


def _device(vf: VirtualFunction, driver: DpdkDriver, reason: str) -> Device | None:
    if vf.driver != driver:
        return None
    nodes: tuple[str, ...]
    mounts: tuple[str, ...] = ()
    if driver is DpdkDriver.VFIO_PCI:
        if vf.iommu_group is None:
            return None
        group = f"noiommu-{vf.iommu_group}" if vf.noiommu else str(vf.iommu_group)
        nodes = (f"{_VFIO}/{group}", f"{_VFIO}/vfio")
    else:
        if vf.uio is None:
            return None
        nodes = (f"/dev/{vf.uio}",)
        mounts = (f"/sys/class/uio/{vf.uio}/device",)
    return Device(vf.address, vf.pf, vf.numa_node, nodes, mounts, reason)


def _why_gone(
    device: Device,
    vf: VirtualFunction | None,
    inventory: Inventory,
    names: Mapping[PciAddress, str],
    driver: DpdkDriver,
) -> str:
    if vf is None:
        if device.address in inventory.cut:
            return "beyond --max-num-devices now"
        return "it is gone or cannot be read"
    if vf.driver is None:
        return f"not bound to {driver} any more"
    if vf.driver != driver:
        return f"bound to {vf.driver} now"
    name = names[vf.address]
    return f"it is {name} now" if vf.iommu_group is not None or vf.uio else "it has no device file to give"
