"""The PCI bus of the emulated kernel: devices, drivers, who is bound to what, and the tree and uevents that show it.

After the kernel's drivers/base/{bus,dd}.c and drivers/pci/pci-driver.c, in their order of steps. One monitor guards all
of it; every method is called with it held. What waits in the kernel waits here too and lets the monitor go meanwhile:
`locked` is a device's own lock, held while it is bound, unbound or removed.
"""

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qat_shared.pci import PciAddress
from qat_simulation.kernel.model import Device, Driver, Numbers, failure
from qat_simulation.kernel.sysfs.tree import Tree
from qat_simulation.kernel.uevents import Broadcaster
from qat_simulation.node.description import Node

DEVICES = "bus/pci/devices"
GROUPS = "kernel/iommu_groups"


class Bus:
    """All devices and drivers. What the callbacks do is said where kernel.py sets them."""

    def __init__(self, tree: Tree, uevents: Broadcaster, node: Node) -> None:
        self.monitor = threading.Condition(threading.RLock())
        self.tree = tree
        self.iommu = node.iommu
        self.noiommu = node.noiommu
        self.denies = not node.disable_denylist
        self.canonical_services = node.canonical_services
        self.autoprobe = True
        self.closed = False
        self.devices: dict[PciAddress, Device] = {}
        self.drivers: dict[str, Driver] = {}
        self.uio_numbers = Numbers()
        self.entries: Callable[[Device], list[tuple[str, str, int]]] = lambda device: []
        self.refresh: Callable[..., None] = lambda device, *names: None
        self.probe_fault: Callable[[Device], None] = lambda device: None
        self.rescan: Callable[[], None] = lambda: None
        self._group_numbers = Numbers()
        self._uevents = uevents

    def wait(self, timeout: float | None = None) -> None:
        """Let others work until something has changed. Raises OSError when the kernel ends."""
        self.monitor.wait(timeout)
        self.check_open()

    def check_open(self) -> None:
        """Raises OSError when the kernel has ended."""
        if self.closed:
            raise failure(errno.ESHUTDOWN)

    @contextmanager
    def locked(self, device: Device) -> Iterator[None]:
        """Hold the device's lock; waits for it."""
        while device.locked:
            self.wait()
        device.locked = True
        try:
            yield
        finally:
            device.locked = False
            self.monitor.notify_all()

    def event(self, action: str, device: Device) -> None:
        """Send a device's uevent."""
        self._uevents.send(action, f"/{device.path}", "pci", device.uevent_fields)

    def other_event(self, action: str, path: str, subsystem: str, *fields: str) -> None:
        """Send a uevent of something that is no PCI device (a driver, a module, uio3)."""
        self._uevents.send(action, f"/{path}", subsystem, fields)

    # Devices

    def add_device(self, device: Device) -> None:
        """device_add: it is there, it has a group, nobody has looked at it yet."""
        if device.address in self.devices:
            raise failure(errno.EEXIST)
        self.devices[device.address] = device
        if self.iommu:
            self.join_group(device, "DMA-FQ")
        self.tree.folder(device.path, self.entries(device))
        self.tree.link(f"{device.path}/subsystem", "bus/pci")
        self._link_group(device)
        self.tree.link(f"{DEVICES}/{device.address}", device.path)
        self.event("add", device)

    def remove_device(self, device: Device) -> None:
        """pci_stop_and_remove_bus_device, its lock held: off its driver first, which may wait, then gone."""
        if device.dead:
            return
        self.detach(device)
        device.dead = True
        self.tree.unlink(f"{DEVICES}/{device.address}")
        self.leave_group(device)
        self.event("remove", device)
        self.tree.remove_folder(device.path)
        del self.devices[device.address]

    def join_group(self, device: Device, kind: str, name: str = "") -> None:
        """Give the device an IOMMU group of its own; only vfio's no-IOMMU groups have a name."""
        device.group = self._group_numbers.take()
        files = [("type", f"{kind}\n", 0o644), ("reserved_regions", "", 0o444)] if kind else []
        if name:
            files.append(("name", f"{name}\n", 0o444))
        path = f"{GROUPS}/{device.group}"
        self.tree.folder(path, files)
        self.tree.folder(f"{path}/devices")
        self.tree.link(f"{path}/devices/{device.address}", device.path)
        if name:
            self._link_group(device)

    def leave_group(self, device: Device) -> None:
        """Take the device out of its group, which ends."""
        if device.group is None:
            return
        self.tree.unlink(f"{device.path}/iommu_group")
        self.tree.remove_folder(f"{GROUPS}/{device.group}")
        self._group_numbers.give_back(device.group)
        device.group = None

    def _link_group(self, device: Device) -> None:
        if device.group is not None:
            self.tree.link(f"{device.path}/iommu_group", f"{GROUPS}/{device.group}")

    # Binding

    def attach(self, device: Device) -> bool:
        """device_attach, its lock held: ask the drivers one after the other; what they answer is nobody's concern."""
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
        """__driver_probe_device, its lock held. Raises OSError: ENODEV, EBUSY, or what the driver says."""
        if device.dead:
            raise failure(errno.ENODEV)
        if device.driver is not None:
            raise failure(errno.EBUSY)
        pf = device.physfn
        if pf is not None and pf.sriov is not None and not pf.sriov.autoprobe and device.override is None:
            raise failure(errno.ENODEV)  # pci_device_can_probe: even a bind by hand is refused
        device.driver = driver
        self._link_driver(device)
        try:
            self.probe_fault(device)
            driver.probe(self, device)
        except OSError:
            self._unlink_driver(device)
            device.driver = None
            raise
        self.refresh(device, "enable", "power/runtime_status", "uevent")
        self.event("bind", device)

    def detach(self, device: Device) -> None:
        """__device_release_driver, its lock held: the link goes at once, then the driver lets go, when it can."""
        driver = device.driver
        if driver is None:
            return
        self._unlink_driver(device)
        driver.remove(self, device)
        device.driver = None
        self.refresh(device, "enable", "power/runtime_status", "uevent")
        self.event("unbind", device)

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
        """modprobe: the driver is there, and takes all devices that it matches and nobody has."""
        if driver.name in self.drivers:
            raise failure(errno.EEXIST)
        module = f"module/{driver.module}"
        if not (self.tree.root / module).exists():
            self.tree.folder(module, [("initstate", "live\n", 0o444)])
        self.other_event("add", module, "module")
        self.drivers[driver.name] = driver
        controls = ("bind", "unbind", "new_id", "remove_id", "uevent")
        self.tree.folder(driver.path, [(name, "", 0o200) for name in controls])
        self.tree.link(f"{driver.path}/module", module)
        if self.autoprobe:
            self.attach_all(driver)
        self.other_event("add", driver.path, "drivers")

    def attach_all(self, driver: Driver) -> None:
        """driver_attach: offer the driver all devices that have none."""
        for device in tuple(self.devices.values()):
            if device.driver is None and driver.matches(device):
                with self.locked(device):
                    try:
                        self.probe(driver, device)
                    except OSError:
                        self.check_open()

    def remove_driver(self, name: str) -> None:
        """modprobe -r. Raises OSError: ENOENT, EAGAIN while a device is open through it."""
        driver = self.drivers.get(name)
        if driver is None:
            raise failure(errno.ENOENT)
        if any(device.opened for device in self.devices.values() if device.driver is driver):
            raise failure(errno.EAGAIN)
        del self.drivers[name]
        for device in tuple(self.devices.values()):
            if device.driver is driver:
                with self.locked(device):
                    if device.driver is driver:
                        self.detach(device)
        self.tree.remove_folder(driver.path)
        self.other_event("remove", driver.path, "drivers")
        if all(other.module != driver.module for other in self.drivers.values()):
            self.tree.remove_folder(f"module/{driver.module}")
        self.other_event("remove", f"module/{driver.module}", "module")
