"""The devices on the PCI bus and the drivers that they are bound to, from names in sysfs and the table of QAT drivers.

Only the server searches for devices. The helper works on the devices that its requests name.
"""

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError, open_device, pci_directory

VF_DRIVERS: Final = frozenset(kind.driver for kind in VIRTUAL.values())
"""Every kernel VF driver in the device table: the valid values of --kernel-vf-drivers."""

PF_DRIVERS: Final = frozenset(kind.driver for kind in PHYSICAL.values())


def pf_driver_of(vf_driver: str) -> str:
    """The PF driver that belongs to a kernel VF driver of the table (4xxxvf: 4xxx)."""
    return vf_driver.removesuffix("vf")


def pci_addresses(root: Path) -> list[PciAddress]:
    """The addresses of all PCI devices of all domains, in address order. Raises SysfsError."""
    try:
        return _addresses(os.listdir(pci_directory(root) / "devices"))
    except OSError as error:
        raise SysfsError(str(root), "bus/pci/devices", os.strerror(error.errno or 0)) from error


def driver_addresses(root: Path, driver: str) -> list[PciAddress]:
    """The addresses of the devices bound to a driver, in address order; empty when the driver is not loaded.

    Raises SysfsError, OSError.
    """
    try:
        return _addresses(os.listdir(pci_directory(root) / "drivers" / driver))
    except FileNotFoundError:
        return []


def pfs_without_driver(root: Path, drivers: Collection[str]) -> list[PciAddress]:
    """The PFs that could be provisioned if their driver, one of `drivers`, were loaded, in address order.

    Empty when the bus cannot be read. A device that cannot be read is left out.
    """
    try:
        addresses = pci_addresses(root)
    except SysfsError:
        return []
    found = []
    for address in addresses:
        try:
            with open_device(root, address) as device:
                kind = PHYSICAL.get(device.read_int("device", 16))
                if kind is None or not kind.provisioned or kind.driver not in drivers:
                    continue
                if device.read_int("vendor", 16) == VENDOR_INTEL and device.link("driver") is None:
                    found.append(address)
        except SysfsError:
            continue  # it is being removed, or becomes a Problem once it has its driver
    return found


def _addresses(names: Iterable[str]) -> list[PciAddress]:
    found = []
    for name in names:
        try:
            found.append(PciAddress.parse(name))
        except ValueError:
            continue  # a driver's folder also has bind, unbind, new_id, module, ...
    return sorted(found)
