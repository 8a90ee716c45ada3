"""What QAT functions the node has: a sysfs tree in, an immutable Inventory out. Nothing is kept, nothing is written.

PFs are the devices on the PF driver beside each selected kernel VF driver; their VFs are their virtfnN. Where no such
PF is (inside a VM), the VFs are all devices with a selected VF id. A device that cannot be read, or vanishes while it is
read, becomes a Problem or is left out; only a root without a PCI bus is an error.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Final

from qat_server.inventory import Inventory, PhysicalFunction, Problem, VirtualFunction
from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL, pf_driver_of
from qat_shared.pci import PciAddress
from qat_shared.sysfs import (
    MalformedError,
    MissingError,
    PciDevice,
    SysfsError,
    driver_addresses,
    open_device,
    pci_addresses,
    pci_directory,
)

_NOIOMMU: Final = "vfio-noiommu"  # drivers/vfio: the group's name where there is no IOMMU


def discover(
    sysfs_root: Path,
    vf_drivers: Sequence[str],
    max_devices: int,
    previous: Inventory | None = None,
    changed: Collection[PciAddress] | None = None,
) -> Inventory:
    """Look at the node. Raises SysfsError when `sysfs_root` is no sysfs tree with a PCI bus.

    `vf_drivers` are kernel VF drivers of the device table; `max_devices` cuts the VFs in address order. With `previous`
    and `changed`, VFs that are not named in `changed` are taken from `previous` when their PF is as it was.
    """
    pci_directory(sysfs_root)
    look = _Look(sysfs_root, frozenset(vf_drivers), previous, changed)
    pfs = tuple(look.physical_functions())
    wanted = sorted({vf for pf in pfs for vf in pf.vfs}) if pfs else look.lone_virtual_functions()
    parents = {vf: pf.address for pf in pfs for vf in pf.vfs}
    vfs = tuple(vf for address in wanted[:max_devices] if (vf := look.virtual_function(address, parents.get(address))))
    return Inventory(pfs, vfs, tuple(wanted[max_devices:]), tuple(look.problems))


class _Look:
    """One look at one tree; collects the problems."""

    def __init__(
        self,
        root: Path,
        drivers: frozenset[str],
        previous: Inventory | None,
        changed: Collection[PciAddress] | None,
    ) -> None:
        self._root = root
        self._drivers = drivers
        self._known: dict[PciAddress, VirtualFunction] = {}
        if previous is not None and changed is not None:
            self._known = {vf.address: vf for vf in previous.vfs if vf.address not in changed and vf.pf not in changed}
        self.problems: list[Problem] = []

    def physical_functions(self) -> Iterable[PhysicalFunction]:
        drivers = sorted({pf_driver_of(driver) for driver in self._drivers})
        for address in sorted({address for driver in drivers for address in driver_addresses(self._root, driver)}):
            try:
                with open_device(self._root, address) as device:
                    pf = self._physical_function(device)
            except MissingError:
                continue  # it went away since the listing
            except SysfsError as error:
                self._problem(address, error)
                continue
            if pf is not None:
                yield pf

    def lone_virtual_functions(self) -> list[PciAddress]:
        found = []
        for address in pci_addresses(self._root):
            try:
                with open_device(self._root, address) as device:
                    kind = VIRTUAL.get(device.read_int("device", 16))
                    if kind is not None and kind.driver in self._drivers and _is_intel(device):
                        found.append(address)
            except SysfsError:
                continue  # not known to be one of ours, so not ours to complain of
        return found

    def virtual_function(self, address: PciAddress, pf: PciAddress | None) -> VirtualFunction | None:
        if (known := self._known.get(address)) is not None and known.pf == pf:
            return known
        try:
            with open_device(self._root, address) as device:
                return _virtual_function(device, pf)
        except MissingError:
            return None
        except SysfsError as error:
            self._problem(address, error)
            return None

    def _physical_function(self, device: PciDevice) -> PhysicalFunction | None:
        device_id = device.read_int("device", 16)
        driver = device.link("driver")
        if device_id not in PHYSICAL or PHYSICAL[device_id].driver != driver or not _is_intel(device):
            raise MalformedError(str(device.address), "device", f"{device_id:04x} is no QAT PF of driver {driver}")
        vfs = []
        for name, target in device.virtual_functions():
            if isinstance(target, PciAddress):
                vfs.append(target)
            else:
                self.problems.append(Problem(device.address, f"{name}: {target.why}"))
        return PhysicalFunction(
            address=device.address,
            device_id=device_id,
            driver=driver,
            numa_node=_numa_node(device),
            state=self._optional(device, "qat/state"),
            services=self._optional(device, "qat/cfg_services"),
            total_vfs=int(self._optional(device, "sriov_totalvfs") or 0),
            vfs=tuple(sorted(vfs)),
        )

    def _optional(self, device: PciDevice, name: str) -> str | None:
        try:
            return device.read_optional(name)
        except SysfsError as error:
            self._problem(device.address, error)
            return None

    def _problem(self, address: PciAddress, error: SysfsError) -> None:
        self.problems.append(Problem(address, f"{error.path}: {error.why}"))


def _virtual_function(device: PciDevice, pf: PciAddress | None) -> VirtualFunction:
    device_id = device.read_int("device", 16)
    if device_id not in VIRTUAL or not _is_intel(device):
        raise MalformedError(str(device.address), "device", f"{device_id:04x} is not the id of a QAT VF")
    driver = device.link("driver")
    return VirtualFunction(
        address=device.address,
        device_id=device_id,
        driver=driver,
        pf=pf,
        numa_node=_numa_node(device),
        iommu_group=_iommu_group(device),
        noiommu=device.read_optional("iommu_group/name") == _NOIOMMU,
        uio=next(iter(device.names("uio")), None) if driver == "igb_uio" else None,
        in_use=device.read("enable") != "0" if driver == "vfio-pci" else None,
    )


def _is_intel(device: PciDevice) -> bool:
    return device.read_int("vendor", 16) == VENDOR_INTEL


def _numa_node(device: PciDevice) -> int | None:
    text = device.read_optional("numa_node")
    if text is None:
        return None
    try:
        node = int(text)
    except ValueError:
        raise MalformedError(str(device.address), "numa_node", f"{text[:40]!r} is not a number") from None
    return node if node >= 0 else None  # -1: the firmware does not say


def _iommu_group(device: PciDevice) -> int | None:
    name = device.link("iommu_group")
    if name is None:
        return None
    if not name.isdecimal():
        raise MalformedError(str(device.address), "iommu_group", f"{name[:40]!r} is not a group's number")
    return int(name)
