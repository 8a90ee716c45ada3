"""The drivers of the emulated kernel: vfio-pci, igb_uio, the QAT PF driver, and plain ones for all other devices.

The QAT PF driver follows the kernel's qat_common/{adf_sriov,adf_sysfs,adf_init}.c; SR-IOV follows drivers/pci/iov.c.
"""

import errno
from collections.abc import Callable
from typing import Final

from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.model import Device, Driver, os_error
from qat_simulation.node.description import DENYLISTED

QAT_ATTRIBUTES: Final = ("qat/state", "qat/cfg_services", "qat/auto_reset", "qat/num_rps")
_DRIVERS: Final = {number: kind.driver for number, kind in PHYSICAL.items()} | {
    number: kind.driver for number, kind in VIRTUAL.items()
}
_DENIED: Final = frozenset(
    (VENDOR_INTEL, number) for number, driver in _DRIVERS.items() if driver in DENYLISTED and number != 0x0442
)
_PM_IDLE: Final = "qat/pm_idle_enabled"
# Modules that are not named qat_<driver>.
_MODULES: Final = {"c6xx": "qat_c62x", "c6xxvf": "qat_c62xvf"}


class _BusDriver(Driver):
    """A driver that changes the tree, sends uevents or waits."""

    def __init__(self, bus: Bus, name: str, ids: frozenset[tuple[int, int]] = frozenset(), module: str = "") -> None:
        super().__init__(name, ids, module)
        self._bus = bus


class VfioPci(_BusDriver):
    """Accepts devices by driver_override or new_id. Releases a device only when no process has it open."""

    enables = False

    def probe(self, device: Device) -> None:
        """Raises OSError (EINVAL) without an IOMMU, unless no-IOMMU mode is on, and for devices on the denylist."""
        if self._bus.denylist_active and (device.vendor, device.device_id) in _DENIED:
            raise os_error(errno.EINVAL)
        if device.group is None:
            if not self._bus.noiommu:
                raise os_error(errno.EINVAL)
            self._bus.join_group(device, "", "vfio-noiommu")
        node = self._node(device)
        self._bus.tree.make_directory(f"devices/virtual/vfio/{node}", [("uevent", f"DEVNAME=vfio/{node}\n", 0o644)])
        self._bus.tree.link(f"class/vfio/{node}", f"devices/virtual/vfio/{node}")
        self._bus.send_event("add", f"devices/virtual/vfio/{node}", "vfio", f"DEVNAME=vfio/{node}")

    def remove(self, device: Device) -> None:
        """vfio_unregister_group_dev: waits until the device is closed; no signal interrupts the wait."""
        while device.opened:
            self._bus.wait()
        node = self._node(device)
        self._bus.tree.unlink(f"class/vfio/{node}")
        self._bus.send_event("remove", f"devices/virtual/vfio/{node}", "vfio", f"DEVNAME=vfio/{node}")
        self._bus.tree.remove_directory(f"devices/virtual/vfio/{node}")
        if not self._bus.iommu:
            self._bus.leave_group(device)
        if device.sriov is not None:  # a PF: vfio-pci also disables its VFs
            disable_sriov(self._bus, device)

    def _node(self, device: Device) -> str:
        """The device's file name under /dev/vfio."""
        return f"{device.group}" if self._bus.iommu else f"noiommu-{device.group}"


class IgbUio(_BusDriver):
    """DPDK's own module: each device gets a uio number."""

    def probe(self, device: Device) -> None:
        """Always succeeds."""
        device.uio = self._bus.uio_numbers.allocate()
        name = f"uio{device.uio}"
        path = f"{device.path}/uio/{name}"
        numbers = [f"MAJOR=240\nMINOR={device.uio}\nDEVNAME={name}\n", f"240:{device.uio}\n"]
        self._bus.tree.make_directory(
            path,
            [
                ("name", "igb_uio\n", 0o444),
                ("version", "0.1\n", 0o444),
                ("uevent", numbers[0], 0o644),
                ("dev", numbers[1], 0o444),
            ],
        )
        self._bus.tree.link(f"{path}/device", device.path)
        self._bus.tree.link(f"{path}/subsystem", "class/uio")
        self._bus.tree.link(f"class/uio/{name}", path)
        self._bus.send_event("add", path, "uio", *numbers[0].split())

    def remove(self, device: Device) -> None:
        """Does not wait for an open /dev/uioN."""
        assert device.uio is not None  # noqa: S101 - for the type checker
        name = f"uio{device.uio}"
        self._bus.tree.unlink(f"class/uio/{name}")
        self._bus.send_event(
            "remove", f"{device.path}/uio/{name}", "uio", "MAJOR=240", f"MINOR={device.uio}", f"DEVNAME={name}"
        )
        self._bus.tree.remove_directory(f"{device.path}/uio")
        self._bus.uio_numbers.free(device.uio)
        device.uio = None


class QatPf(_BusDriver):
    """The QAT PF driver: qat/ (Gen4 and later), debugfs, and its way to configure SR-IOV."""

    def probe(self, device: Device) -> None:
        """Bring the device up with its first configuration, without VFs."""
        qat = device.qat
        if qat is None:
            raise os_error(errno.ENODEV)
        qat.up, qat.services, qat.auto_reset = True, qat.pf.services or "", qat.pf.auto_reset
        qat.pm_idle = qat.pf.pm_idle_enabled
        if qat.pf.has_qat_attributes:
            names = QAT_ATTRIBUTES if qat.pm_idle is None else (*QAT_ATTRIBUTES, _PM_IDLE)
            for name in names:
                device.file_texts.pop(name, None)
            self._bus.tree.make_directory(f"{device.path}/qat")
            self._bus.refresh(device, *names)
        self._bus.tree.make_directory(debugfs(device))
        self._show(device)

    def remove(self, device: Device) -> None:
        """adf_remove: bring the device down, which also disables its VFs."""
        self.go_down(device)
        self._bus.tree.remove_directory(debugfs(device))
        self._bus.tree.remove_directory(f"{device.path}/qat")

    def go_down(self, device: Device) -> None:
        """adf_dev_down: stop the device, then disable its VFs, which waits for the ones that are open."""
        if device.qat is not None and device.qat.up:
            device.qat.up = False
            self._show(device)
        disable_sriov(self._bus, device)

    def go_up(self, device: Device) -> None:
        """adf_dev_up: VFs are not changed."""
        if device.qat is not None:
            device.qat.up = True
            self._show(device)

    def configure_sriov(self, device: Device, number: int) -> None:
        """adf_sriov_configure: any number but 0 enables all VFs; for 0 too, the device is brought down and up again."""
        if number and not self._bus.iommu:
            raise os_error(errno.EINVAL)
        self.go_down(device)
        self.go_up(device)
        if number:
            enable_sriov(self._bus, device)

    def _show(self, device: Device) -> None:
        show_debugfs(self._bus, device)
        if device.qat is not None and device.qat.pf.has_qat_attributes:
            self._bus.refresh(device, "qat/state", "qat/cfg_services")


def debugfs(device: Device) -> str:
    """The path of the QAT driver's debugfs directory for the device."""
    return f"kernel/debug/qat_{PHYSICAL[device.device_id].driver}_{device.address}"


def show_debugfs(bus: Bus, device: Device) -> None:
    """Update the debugfs files: heartbeat/ exists while the device is up (adf_dbgfs_add, adf_dbgfs_rm)."""
    qat = device.qat
    if qat is None or not isinstance(device.driver, QatPf):
        return
    directory = debugfs(device)
    bus.tree.put(f"{directory}/dev_cfg", _dev_cfg(qat.pf.dev_cfg, qat.services), 0o400)
    heartbeat = f"{directory}/heartbeat"
    if not qat.up:
        bus.tree.remove_directory(heartbeat)
        return
    if not (bus.tree.root / heartbeat).exists():
        bus.tree.make_directory(heartbeat, [("config", "500\n", 0o600), ("queries_failed", "0\n", 0o400)])
    # With a NUL: adf_hb_status_read returns one byte more than the text has.
    bus.tree.put(f"{heartbeat}/status", f"{qat.heartbeat}\n\0", 0o400)


def _dev_cfg(text: str | None, services: str) -> str:
    if text is not None:
        return text
    general = f"ServicesEnabled = {services}\n" if services else ""
    return f"[KERNEL]\nNumberCyInstances = 0\nNumberDcInstances = 0\n[GENERAL]\n{general}"


def enable_sriov(
    bus: Bus, pf: Device, number: int | None = None, place: Callable[[Device], None] | None = None
) -> None:
    """sriov_enable: add the VFs (by default all) one by one; each is offered to the drivers at once, or to `place`."""
    assert pf.sriov is not None  # noqa: S101 - for the type checker
    number = pf.sriov.pf.total_vfs if number is None else number
    for index in range(number):
        vf = Device(
            address=pf.sriov.pf.vf_address(index),
            vendor=pf.vendor,
            device_id=pf.sriov.pf.vf_device_id,
            class_code=pf.class_code,
            numa_node=pf.numa_node,
            path=f"{pf.path.rpartition('/')[0]}/{pf.sriov.pf.vf_address(index)}",
            physfn=pf,
        )
        pf.sriov.vfs.append(vf)
        bus.add_device(vf)
        bus.tree.link(f"{pf.path}/virtfn{index}", vf.path)
        bus.tree.link(f"{vf.path}/physfn", pf.path)
        bus.device_event("change", vf)
        if place is not None:
            place(vf)
        elif bus.autoprobe:
            with bus.locked(vf):
                bus.attach(vf)
    pf.sriov.number = number
    bus.refresh(pf, "sriov_numvfs")
    bus.device_event("change", pf)


def disable_sriov(bus: Bus, pf: Device) -> None:
    """sriov_disable: remove the VFs in order. At a VF that is open it waits; the VFs before it are gone by then."""
    if pf.sriov is None or not pf.sriov.number:
        return
    for index, vf in enumerate(pf.sriov.vfs):
        bus.tree.unlink(f"{pf.path}/virtfn{index}")
        if not vf.dead:
            bus.tree.unlink(f"{vf.path}/physfn")
        with bus.locked(vf):
            bus.remove_device(vf)
    pf.sriov.vfs.clear()
    pf.sriov.number = 0
    bus.refresh(pf, "sriov_numvfs")


def make_driver(bus: Bus, name: str) -> Driver:
    """The driver with this name, as modprobe would find it; an unknown one has no ids."""
    if name == "vfio-pci":
        return VfioPci(bus, name)
    if name == "igb_uio":
        return IgbUio(bus, name)
    module = _MODULES.get(name, f"qat_{name}")
    physical = frozenset((VENDOR_INTEL, number) for number, kind in PHYSICAL.items() if kind.driver == name)
    if physical:
        return QatPf(bus, name, physical, module)
    virtual = frozenset((VENDOR_INTEL, number) for number, kind in VIRTUAL.items() if kind.driver == name)
    return Driver(name, virtual, module if virtual else "")
