"""The things on the emulated PCI bus: devices with their SR-IOV and QAT sides, and what a driver is.

State only: who may change it when is the bus's to say (bus.py), and nothing here touches the tree.
"""

import heapq
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qat_shared.pci import PciAddress
from qat_simulation.node.description import Pf

if TYPE_CHECKING:
    from qat_simulation.kernel.bus import Bus

DRIVERS = "bus/pci/drivers"


def failure(number: int) -> OSError:
    """The OSError of an errno."""
    return OSError(number, os.strerror(number))


@dataclass(eq=False, slots=True)
class Sriov:
    """A PF's SR-IOV capability. `number` is what sriov_numvfs shows."""

    pf: Pf
    number: int = 0
    autoprobe: bool = True
    vfs: "list[Device]" = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Qat:
    """A QAT PF as its driver and its firmware have it. Lives as long as the hardware, bound or not.

    `pm_idle` is None where the driver has no such attribute.
    """

    pf: Pf
    up: bool
    services: str
    auto_reset: bool
    heartbeat: int
    pm_idle: bool | None = True


@dataclass(eq=False, slots=True)
class Device:
    """One PCI function. `linked`: its driver link is there (it goes before the driver has let go).

    `shown`: what the attributes on disk say, where that has changed before.
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
    shown: dict[str, str] = field(default_factory=dict)

    @property
    def enabled(self) -> bool:
        """pci_enable_device was called: vfio-pci does so when it is opened, all other drivers when they bind."""
        return self.driver is not None and (self.opened or self.driver.enables)

    @property
    def suspended(self) -> bool:
        """vfio-pci lets a device sleep while nobody has it open."""
        return self.driver is not None and not self.enabled

    @property
    def uevent_fields(self) -> list[str]:
        """What the PCI bus puts into each uevent (pci_uevent)."""
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
        """The name under which modules say that they can drive it."""
        major, minor, interface = self.class_code >> 16, self.class_code >> 8 & 0xFF, self.class_code & 0xFF
        return (
            f"pci:v{self.vendor:08X}d{self.device_id:08X}sv{self.vendor:08X}sd00000000"
            f"bc{major:02X}sc{minor:02X}i{interface:02X}"
        )


class Driver:
    """A driver that takes the devices of its id table and needs nothing. `enables` as in Device.enabled."""

    enables = True

    def __init__(self, name: str, ids: frozenset[tuple[int, int]] = frozenset(), module: str = "") -> None:
        self.name = name
        self.ids = ids
        self.dynamic: set[tuple[int, int]] = set()
        self.module = module or name.replace("-", "_")
        self.path = f"{DRIVERS}/{name}"

    def matches(self, device: Device) -> bool:
        """As pci_match_device: an override matches its driver and no other, whatever the ids."""
        if device.override is not None:
            return device.override == self.name
        ids = (device.vendor, device.device_id)
        return ids in self.dynamic or ids in self.ids

    def probe(self, bus: "Bus", device: Device) -> None:
        """Take the device. Raises OSError when it will not."""

    def remove(self, bus: "Bus", device: Device) -> None:
        """Let go of the device; may wait."""


class Numbers:
    """Numbers from 0 on, the lowest free one first."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._next = 0

    def take(self) -> int:
        """The lowest number not taken."""
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def give_back(self, number: int) -> None:
        """The number is free again."""
        heapq.heappush(self._free, number)
