"""The PCI bus of the emulated kernel: devices, drivers and bindings, with the tree and the uevents that show them.

Follows the kernel's drivers/base/{bus,dd}.c and drivers/pci/pci-driver.c, in their order of steps. One monitor guards
the state; every method is called with it held. An operation that waits in the kernel waits here too and releases the
monitor meanwhile. `locked` is a device's own lock, held while it is bound, unbound or removed.
"""

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qat_shared.pci import PciAddress
from qat_simulation.kernel.model import Device, Driver, NumberAllocator, os_error
from qat_simulation.kernel.sysfs import attributes
from qat_simulation.kernel.sysfs.tree import Tree
from qat_simulation.kernel.uevents import Broadcaster
from qat_simulation.node.description import Node

DEVICES = "bus/pci/devices"
GROUPS = "kernel/iommu_groups"


class Bus:
    """All devices and drivers.

    The modules above set two callbacks: `probe_fault` may raise OSError for a driver that is about to probe a device
    (faults.py), `rescan` adds the devices that are plugged in and not on the bus (hardware.py).
    """

    def __init__(self, tree: Tree, uevents: Broadcaster, node: Node) -> None:
        self.monitor = threading.Condition(threading.RLock())
        self.tree = tree
        self.iommu = node.iommu
        self.noiommu = node.noiommu
        self.denylist_active = not node.disable_denylist
        self.canonical_services = node.canonical_services
        self.autoprobe = True
        self.closed = False
        self.devices: dict[PciAddress, Device] = {}
        self.drivers: dict[str, Driver] = {}
        self.uio_numbers = NumberAllocator()
        self.probe_fault: Callable[[Device], None] = lambda device: None
        self.rescan: Callable[[], None] = lambda: None
        self._group_numbers = NumberAllocator()
        self._uevents = uevents

    def wait(self, timeout: float | None = None) -> None:
        """Release the monitor until something has changed. Raises OSError (ESHUTDOWN) when the kernel ends."""
        self.monitor.wait(timeout)
        self.check_open()

    def check_open(self) -> None:
        """Raise OSError (ESHUTDOWN) if the kernel has ended."""
        if self.closed:
            raise os_error(errno.ESHUTDOWN)

    @contextmanager
    def locked(self, device: Device) -> Iterator[None]:
        """Wait for the device's lock and hold it while the block runs."""
        while device.locked:
            self.wait()
        device.locked = True
        try:
            yield
        finally:
            device.locked = False
            self.monitor.notify_all()

    def refresh(self, device: Device, *names: str) -> None:
        """Write the device's present state to the files of these attributes."""
        attributes.refresh(self.tree, device, *names)

    def device_event(self, action: str, device: Device) -> None:
        """Send a PCI device's uevent."""
        self._uevents.send(action, f"/{device.path}", "pci", device.uevent_fields)

    def send_event(self, action: str, path: str, subsystem: str, *fields: str) -> None:
        """Send a uevent with other fields or of another subsystem (a driver, a module, uio3)."""
        self._uevents.send(action, f"/{path}", subsystem, fields)

    # Devices

    def add_device(self, device: Device) -> None:
        """device_add: put the device on the bus, in an IOMMU group and without a driver. Raises OSError (EEXIST)."""
        if device.address in self.devices:
            raise os_error(errno.EEXIST)
        self.devices[device.address] = device
        if self.iommu:
            self.join_group(device, "DMA-FQ")
        self.tree.make_directory(device.path, attributes.entries(device))
        self.tree.link(f"{device.path}/subsystem", "bus/pci")
        self._link_group(device)
        self.tree.link(f"{DEVICES}/{device.address}", device.path)
        self.device_event("add", device)

    def remove_device(self, device: Device) -> None:
        """pci_stop_and_remove_bus_device, its lock held: unbind the device, which may wait, then remove it."""
        if device.dead:
            return
        self.detach(device)
        device.dead = True
        self.tree.unlink(f"{DEVICES}/{device.address}")
        self.leave_group(device)
        self.device_event("remove", device)
        self.tree.remove_directory(device.path)
        del self.devices[device.address]

    def join_group(self, device: Device, kind: str, name: str = "") -> None:
        """Give the device an IOMMU group of its own; only vfio's no-IOMMU groups have a name."""
        device.group = self._group_numbers.allocate()
        files = [("type", f"{kind}\n", 0o644), ("reserved_regions", "", 0o444)] if kind else []
        if name:
            files.append(("name", f"{name}\n", 0o444))
        path = f"{GROUPS}/{device.group}"
        self.tree.make_directory(path, files)
        self.tree.make_directory(f"{path}/devices")
        self.tree.link(f"{path}/devices/{device.address}", device.path)
        if name:
            self._link_group(device)

    def leave_group(self, device: Device) -> None:
        """Remove the device from its group, and the group."""
        if device.group is None:
            return
        self.tree.unlink(f"{device.path}/iommu_group")
        self.tree.remove_directory(f"{GROUPS}/{device.group}")
        self._group_numbers.free(device.group)
        device.group = None

    def _link_group(self, device: Device) -> None:
        if device.group is not None:
            self.tree.link(f"{device.path}/iommu_group", f"{GROUPS}/{device.group}")

    # Binding

    def attach(self, device: Device) -> bool:
        """device_attach, its lock held: offer the device to each matching driver; whether one accepted it.

        A driver's error is not reported.
        """
        if device.dead or device.driver is not None:
            return device.driver is not None
        for driver in tuple(self.drivers.values()):
            if driver.matches(device):
                try:
                    self.probe(driver, device)
                except OSError:
                    self.check_open()
                    continue
                return True
        return False

    def probe(self, driver: Driver, device: Device) -> None:
        """__driver_probe_device, its lock held. Raises OSError: ENODEV, EBUSY, or the driver's own error."""
        if device.dead:
            raise os_error(errno.ENODEV)
        if device.driver is not None:
            raise os_error(errno.EBUSY)
        pf = device.physfn
        if pf is not None and pf.sriov is not None and not pf.sriov.autoprobe and device.override is None:
            raise os_error(errno.ENODEV)  # pci_device_can_probe: even a write to bind is refused
        device.driver = driver
        self._link_driver(device)
        try:
            self.probe_fault(device)
            driver.probe(device)
        except OSError:
            self._unlink_driver(device)
            device.driver = None
            raise
        self.refresh(device, "enable", "power/runtime_status", "uevent")
        self.device_event("bind", device)

    def detach(self, device: Device) -> None:
        """__device_release_driver, its lock held: remove the link, then let the driver release the device; may wait."""
        driver = device.driver
        if driver is None:
            return
        self._unlink_driver(device)
        driver.remove(device)
        device.driver = None
        self.refresh(device, "enable", "power/runtime_status", "uevent")
        self.device_event("unbind", device)

    def _link_driver(self, device: Device) -> None:
        assert device.driver is not None  # noqa: S101 - for the type checker
        self.tree.link(f"{device.driver.path}/{device.address}", device.path)
        self.tree.link(f"{device.path}/driver", device.driver.path)
        device.linked = True

    def _unlink_driver(self, device: Device) -> None:
        assert device.driver is not None  # noqa: S101 - for the type checker
        self.tree.unlink(f"{device.path}/driver")
        self.tree.unlink(f"{device.driver.path}/{device.address}")
        device.linked = False

    # Drivers

    def add_driver(self, driver: Driver) -> None:
        """modprobe: add the driver, and offer it all devices that it matches and that have no driver."""
        if driver.name in self.drivers:
            raise os_error(errno.EEXIST)
        module = f"module/{driver.module}"
        if not (self.tree.root / module).exists():
            self.tree.make_directory(module, [("initstate", "live\n", 0o444)])
        self.send_event("add", module, "module")
        self.drivers[driver.name] = driver
        controls = ("bind", "unbind", "new_id", "remove_id", "uevent")
        self.tree.make_directory(driver.path, [(name, "", 0o200) for name in controls])
        self.tree.link(f"{driver.path}/module", module)
        if self.autoprobe:
            self.attach_all(driver)
        self.send_event("add", driver.path, "drivers")

    def attach_all(self, driver: Driver) -> None:
        """driver_attach: offer the driver each device that it matches and that has no driver."""
        for device in tuple(self.devices.values()):
            if device.driver is None and driver.matches(device):
                with self.locked(device):
                    try:
                        self.probe(driver, device)
                    except OSError:
                        self.check_open()

    def remove_driver(self, name: str) -> None:
        """modprobe -r. Raises OSError: ENOENT, or EAGAIN while a device of this driver is open."""
        driver = self.drivers.get(name)
        if driver is None:
            raise os_error(errno.ENOENT)
        if any(device.opened for device in self.devices.values() if device.driver is driver):
            raise os_error(errno.EAGAIN)
        del self.drivers[name]
        for device in tuple(self.devices.values()):
            if device.driver is driver:
                with self.locked(device):
                    if device.driver is driver:
                        self.detach(device)
        self.tree.remove_directory(driver.path)
        self.send_event("remove", driver.path, "drivers")
        if all(other.module != driver.module for other in self.drivers.values()):
            self.tree.remove_directory(f"module/{driver.module}")
        self.send_event("remove", f"module/{driver.module}", "module")
