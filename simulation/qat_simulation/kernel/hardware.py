"""The hardware plugged into the emulated node, and how it is added to the bus: at the start, on rescan or hot plug."""

import functools
from typing import Final

import msgspec

from qat_shared.devices import VENDOR_INTEL
from qat_shared.pci import PciAddress
from qat_simulation.kernel import drivers
from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.model import Device, Qat, Sriov
from qat_simulation.node.description import LoneVf, Node, OtherDevice, Pf

_QAT_CLASS: Final = 0x0B4000
_VFIO_PCI: Final = "module/vfio_pci"
_DIRECTORIES: Final = (
    "bus/pci/devices",
    "bus/pci/drivers",
    "kernel/iommu_groups",
    "class/uio",
    "class/vfio",
    "devices",
)


class Hardware:
    """The node's description, kept up to date with the plugged-in devices. Called with the bus's monitor held."""

    def __init__(self, bus: Bus, node: Node) -> None:
        self._bus = bus
        self._node = node
        bus.rescan = self._rescan

    def build(self) -> None:
        """Make the whole node as described."""
        tree, node = self._bus.tree, self._node
        for directory in _DIRECTORIES:
            tree.make_directory(directory)
        tree.make_directory(
            "module/vfio/parameters", [("enable_unsafe_noiommu_mode", f"{'NY'[node.noiommu]}\n", 0o644)]
        )
        tree.make_directory("kernel/debug", mode=0o700)
        tree.put("bus/pci/drivers_probe", "", 0o200)
        tree.put("bus/pci/drivers_autoprobe", "1\n", 0o644)
        tree.put("bus/pci/rescan", "", 0o200)
        named = [name for pf in node.pfs for name in (pf.driver, pf.vf_driver)]
        named += [device.driver for device in node.vfs]
        named += [device.driver for device in node.others]
        for name in dict.fromkeys((*node.loaded_kernel_drivers, *node.drivers, *filter(None, named))):
            self._bus.add_driver(drivers.make_driver(self._bus, name))
        if "vfio-pci" in self._bus.drivers:
            tree.make_directory(
                f"{_VFIO_PCI}/parameters", [("disable_denylist", f"{'NY'[node.disable_denylist]}\n", 0o444)]
            )
        for hardware in self._present():
            self._plug(hardware, as_described=True)

    def add_pf(self, pf: Pf) -> None:
        """Plug in a PF in the described state. Raises NodeError if it does not fit this node."""
        self._node = msgspec.structs.replace(self._node, pfs=(*self._node.pfs, pf))
        for name in filter(None, (pf.driver, pf.vf_driver)):
            if name not in self._bus.drivers:
                self._bus.add_driver(drivers.make_driver(self._bus, name))
        self._plug(pf, as_described=True)

    def forget(self, address: str) -> None:
        """Remove a device from the description: a rescan does not find it any more."""
        node = self._node
        self._node = msgspec.structs.replace(
            node,
            pfs=tuple(device for device in node.pfs if device.address != address),
            vfs=tuple(device for device in node.vfs if device.address != address),
            others=tuple(device for device in node.others if device.address != address),
        )

    def _present(self) -> list[Pf | LoneVf | OtherDevice]:
        everything: list[Pf | LoneVf | OtherDevice] = [*self._node.pfs, *self._node.vfs, *self._node.others]
        return sorted(everything, key=lambda device: PciAddress.parse(device.address))

    def _rescan(self) -> None:
        for hardware in self._present():
            if PciAddress.parse(hardware.address) not in self._bus.devices:
                self._plug(hardware, as_described=False)

    def _plug(self, hardware: Pf | LoneVf | OtherDevice, *, as_described: bool) -> None:
        bus, address = self._bus, PciAddress.parse(hardware.address)
        device = Device(
            address=address,
            vendor=int(hardware.vendor, 16) if isinstance(hardware, OtherDevice) else VENDOR_INTEL,
            device_id=int(hardware.device, 16),
            class_code=int(hardware.class_code, 16) if isinstance(hardware, OtherDevice) else _QAT_CLASS,
            numa_node=hardware.numa_node,
            path=f"devices/pci{address.domain:04x}:{address.bus:02x}/{address}",
        )
        if isinstance(hardware, Pf):
            device.sriov = Sriov(hardware) if hardware.total_vfs else None
            device.qat = Qat(
                hardware,
                True,
                hardware.services or "",
                hardware.auto_reset,
                hardware.heartbeat,
                hardware.pm_idle_enabled,
            )
        bus.add_device(device)
        self._place(device, hardware.driver if as_described else None)
        if not as_described or not isinstance(hardware, Pf):
            return
        if isinstance(device.driver, drivers.QatPf) and hardware.state == "down":
            device.driver.go_down(device)
        if hardware.enabled_vfs:
            place = functools.partial(self._place, wanted=hardware.vf_driver)
            drivers.enable_sriov(bus, device, hardware.enabled_vfs, place)

    def _place(self, device: Device, wanted: str | None) -> None:
        """Bind a new device as described: by the kernel's own choice, to no driver (""), or to a named one."""
        if wanted == "":
            return
        if wanted is not None and not self._bus.drivers[wanted].matches(device):
            device.override = wanted
            self._bus.refresh(device, "driver_override")
        with self._bus.locked(device):
            self._bus.attach(device)
