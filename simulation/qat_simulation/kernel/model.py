"""The objects on the emulated PCI bus: devices with their SR-IOV and QAT state, and the base class of drivers.

State only. The bus decides who may change it and when (bus.py); nothing here touches the tree.
"""

import heapq
import os
from dataclasses import dataclass, field

from qat_shared.pci import PciAddress
from qat_simulation.node.description import Pf

DRIVERS = "bus/pci/drivers"


def os_error(number: int) -> OSError:
    """The OSError for an errno."""
    return OSError(number, os.strerror(number))


@dataclass(eq=False, slots=True)
class Sriov:
    """A PF's SR-IOV capability. `number` is the value of sriov_numvfs."""

    pf: Pf
    number: int = 0
    autoprobe: bool = True
    vfs: "list[Device]" = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Qat:
    """The state of a QAT PF's driver and firmware. It lasts as long as the hardware, bound or not.

    `pm_idle` is None if the driver has no such attribute.
    """

    pf: Pf
    up: bool
    services: str
    auto_reset: bool
    heartbeat: int
    pm_idle: bool | None = True


@dataclass(eq=False, slots=True)
class Device:
    """One PCI function. `linked`: its driver link exists (it is removed before the driver has released the device).

    `file_texts` has the present text of each attribute's file that was rewritten since the device was added.
    """

    address: PciAddress
    vendor: int
    device_id: int
    class_code: int
    numa_node: int | None
    path: str
    driver: "Driver | None" = None
    linked: bool = False
    override: str | None = None
    group: int | None = None
    uio: int | None = None
    opened: bool = False
    physfn: "Device | None" = None
    sriov: Sriov | None = None
    qat: Qat | None = None
    locked: bool = False
    dead: bool = False
    file_texts: dict[str, str] = field(default_factory=dict)

    @property
    def enabled(self) -> bool:
        """Whether pci_enable_device was called: vfio-pci calls it on open, all other drivers when they bind."""
        return self.driver is not None and (self.opened or self.driver.enables)

    @property
    def suspended(self) -> bool:
        """Whether the device is runtime-suspended: vfio-pci suspends a device while no process has it open."""
        return self.driver is not None and not self.enabled

    @property
    def uevent_fields(self) -> list[str]:
        """The fields that the PCI bus adds to each uevent (pci_uevent)."""
        fields = [f"DRIVER={self.driver.name}"] if self.driver is not None else []
        return [
            *fields,
            f"PCI_CLASS={self.class_code:04X}",
            f"PCI_ID={self.vendor:04X}:{self.device_id:04X}",
            f"PCI_SUBSYS_ID={self.vendor:04X}:0000",
            f"PCI_SLOT_NAME={self.address}",
            f"MODALIAS={self.modalias}",
        ]

    @property
    def modalias(self) -> str:
        """The string that modules' aliases are matched with."""
        major, minor, interface = self.class_code >> 16, self.class_code >> 8 & 0xFF, self.class_code & 0xFF
        return (
            f"pci:v{self.vendor:08X}d{self.device_id:08X}sv{self.vendor:08X}sd00000000"
            f"bc{major:02X}sc{minor:02X}i{interface:02X}"
        )


class Driver:
    """A driver that accepts every device of its id table and has no state. `enables` as in Device.enabled."""

    enables = True

    def __init__(self, name: str, ids: frozenset[tuple[int, int]] = frozenset(), module: str = "") -> None:
        self.name = name
        self.ids = ids
        self.dynamic: set[tuple[int, int]] = set()
        self.module = module or name.replace("-", "_")
        self.path = f"{DRIVERS}/{name}"

    def matches(self, device: Device) -> bool:
        """As in pci_match_device: an override matches its driver and no other, whatever the ids."""
        if device.override is not None:
            return device.override == self.name
        ids = (device.vendor, device.device_id)
        return ids in self.dynamic or ids in self.ids

    def probe(self, device: Device) -> None:
        """Accept the device. Raises OSError if the driver does not accept it."""

    def remove(self, device: Device) -> None:
        """Release the device; may wait."""


class NumberAllocator:
    """Numbers from 0 on, the lowest free one first."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._next = 0

    def allocate(self) -> int:
        """The lowest free number."""
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def free(self, number: int) -> None:
        """Make the number available again."""
        heapq.heappush(self._free, number)
