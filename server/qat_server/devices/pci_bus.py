"""Which devices are on the PCI bus, and which of them are on a driver: names in sysfs, nothing of a device itself.

Beside the readers that the helper needs too (qat_shared.sysfs), since it never looks for devices: it is told which.
"""

import os
from pathlib import Path

from qat_shared.pci import PciAddress
from qat_shared.sysfs import pci_directory


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
