"""The device table: the PCI ids of QuickAssist, their kernel drivers, and what each may be used for.

Sources: the id tables of the kernel's drivers/crypto/intel/qat and include/linux/pci_ids.h. Driver names are those in
sysfs (the C62x VF driver's module is qat_c62xvf, its name c6xxvf). Devices outside these tables are never touched.
"""

from types import MappingProxyType
from typing import Final

from msgspec import Struct

VENDOR_INTEL: Final = 0x8086


class Physical(Struct, frozen=True):
    """A kind of PF: its kernel driver, and whether its VFs and services may be provisioned."""

    driver: str
    provisioned: bool


class Virtual(Struct, frozen=True):
    """A kind of VF: its kernel driver, its PF's device id, and whether the PF's services name its resource."""

    driver: str
    physical: int
    named_by_services: bool


PHYSICAL: Final = MappingProxyType(
    {
        0x0435: Physical("dh895xcc", provisioned=False),
        0x18A0: Physical("c4xxx", provisioned=False),
        0x19E2: Physical("c3xxx", provisioned=False),
        0x37C8: Physical("c6xx", provisioned=True),
        0x4940: Physical("4xxx", provisioned=True),
        0x4942: Physical("4xxx", provisioned=True),
        0x4944: Physical("4xxx", provisioned=True),
        0x4946: Physical("420xx", provisioned=True),
        0x4948: Physical("6xxx", provisioned=True),
        0x6F54: Physical("d15xx", provisioned=False),
    }
)

VIRTUAL: Final = MappingProxyType(
    {
        0x0442: Virtual("dh895xccvf", 0x0435, named_by_services=False),
        0x0443: Virtual("dh895xccvf", 0x0435, named_by_services=False),
        0x18A1: Virtual("c4xxxvf", 0x18A0, named_by_services=False),
        0x19E3: Virtual("c3xxxvf", 0x19E2, named_by_services=False),
        0x37C9: Virtual("c6xxvf", 0x37C8, named_by_services=False),
        0x4941: Virtual("4xxxvf", 0x4940, named_by_services=True),
        0x4943: Virtual("4xxxvf", 0x4942, named_by_services=True),
        0x4945: Virtual("4xxxvf", 0x4944, named_by_services=True),
        0x4947: Virtual("420xxvf", 0x4946, named_by_services=True),
        0x4949: Virtual("6xxxvf", 0x4948, named_by_services=True),
        0x6F55: Virtual("d15xxvf", 0x6F54, named_by_services=False),
    }
)


def is_qat(vendor: int, device: int) -> bool:
    """Whether a PCI vendor and device id are in the device table."""
    return vendor == VENDOR_INTEL and (device in VIRTUAL or device in PHYSICAL)
