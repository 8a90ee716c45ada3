"""The devices on the PCI bus and the drivers that they are bound to: names in sysfs, and the table of QAT drivers.

The helper needs none of this: it never searches for devices, its requests name them.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError, open_device, pci_directory

VF_DRIVERS: Final = frozenset(kind.driver for kind in VIRTUAL.values())
"""Every kernel VF driver of the device table: the values of --kernel-vf-drivers."""

PF_DRIVERS: Final = frozenset(kind.driver for kind in PHYSICAL.values())


def pf_driver_of(vf_driver: str) -> str:
    """The PF driver that belongs to a kernel VF driver of the table (4xxxvf: 4xxx)."""
    return vf_driver.removesuffix("vf")


def pci_addresses(root: Path) -> list[PciAddress]:
    """The addresses of all PCI devices of all domains, in address order; names that are no address are left out."""
    found = []
    for name in os.listdir(pci_directory(root) / "devices"):
        try:
            found.append(PciAddress.parse(name))
        except ValueError:
            continue
    return sorted(found)


def driver_addresses(root: Path, driver: str) -> list[PciAddress]:
    """The addresses of the devices bound to a driver, in order; empty when the driver is not loaded."""
    try:
        names = os.listdir(pci_directory(root) / "drivers" / driver)
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        try:
            found.append(PciAddress.parse(name))
        except ValueError:
            continue  # bind, unbind, new_id, module, ...
    return sorted(found)


def pfs_without_driver(root: Path, drivers: Collection[str]) -> list[PciAddress]:
    """The provisionable PFs of these drivers that no driver is bound to; they have VFs once their driver is loaded.

    Empty when the bus cannot be read. A device that cannot be read is left out.
    """
    found = []
    try:
        addresses = pci_addresses(root)
    except OSError:
        return []
    for address in addresses:
        try:
            with open_device(root, address) as device:
                kind = PHYSICAL.get(device.read_int("device", 16))
                if kind is None or not kind.provisioned or kind.driver not in drivers:
                    continue
                if device.read_int("vendor", 16) == VENDOR_INTEL and device.link("driver") is None:
                    found.append(address)
        except SysfsError:
            continue  # it is going, or becomes a problem once it has its driver
    return found
