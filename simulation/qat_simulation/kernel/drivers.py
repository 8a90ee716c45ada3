"""The drivers of the emulated kernel: vfio-pci, igb_uio, the QAT PF driver, and plain ones for all else.

The QAT PF driver follows the kernel's qat_common/{adf_sriov,adf_sysfs,adf_init}.c; SR-IOV itself drivers/pci/iov.c.
"""

import errno
from collections.abc import Callable
from typing import Final

from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.model import Device, Driver, failure
from qat_simulation.node.description import DENYLISTED

QAT_ATTRIBUTES: Final = ("qat/state", "qat/cfg_services", "qat/auto_reset", "qat/num_rps")
_DRIVERS: Final = {number: kind.driver for number, kind in PHYSICAL.items()} | {
    number: kind.driver for number, kind in VIRTUAL.items()
}
_DENIED: Final = frozenset(
    (VENDOR_INTEL, number) for number, driver in _DRIVERS.items() if driver in DENYLISTED and number != 0x0442
)
_PM_IDLE: Final = "qat/pm_idle_enabled"
# Modules whose name is not qat_<driver>.
_MODULES: Final = {"c6xx": "qat_c62x", "c6xxvf": "qat_c62xvf"}


class VfioPci(Driver):
    """Takes what is given to it by override. Lets go only when no process has the device open."""

    enables = False

    def probe(self, bus: Bus, device: Device) -> None:
        """Raises OSError EINVAL without an IOMMU, unless vfio was told to do without, and for what is denied."""
        if bus.denies and (device.vendor, device.device_id) in _DENIED:
            raise failure(errno.EINVAL)
        if device.group is None:
            if not bus.noiommu:
                raise failure(errno.EINVAL)
            bus.join_group(device, "", "vfio-noiommu")
        node = self._node(device)
        bus.tree.folder(f"devices/virtual/vfio/{node}", [("uevent", f"DEVNAME=vfio/{node}\n", 0o644)])
        bus.tree.link(f"class/vfio/{node}", f"devices/virtual/vfio/{node}")
        bus.other_event("add", f"devices/virtual/vfio/{node}", "vfio", f"DEVNAME=vfio/{node}")

    def remove(self, bus: Bus, device: Device) -> None:
        """vfio_unregister_group_dev: waits until it is closed, and no signal ends that."""
        while device.opened:
            bus.wait()
        node = self._node(device)
        bus.tree.unlink(f"class/vfio/{node}")
        bus.other_event("remove", f"devices/virtual/vfio/{node}", "vfio", f"DEVNAME=vfio/{node}")
        bus.tree.remove_folder(f"devices/virtual/vfio/{node}")
        if not bus.iommu:
            bus.leave_group(device)
        if device.sriov is not None:  # a PF: vfio-pci does not leave VFs behind either
            disable_sriov(bus, device)

    def _node(self, device: Device) -> str:
        """Its file name under /dev/vfio."""
        return f"{device.group}"


class NoIommuVfioPci(VfioPci):
    """vfio-pci in its no-IOMMU mode."""

    def _node(self, device: Device) -> str:
        return f"noiommu-{device.group}"


class IgbUio(Driver):
    """DPDK's own module: each device gets a uio number."""

    def probe(self, bus: Bus, device: Device) -> None:
        """Always succeeds."""
        device.uio = bus.uio_numbers.take()
        name = f"uio{device.uio}"
        path = f"{device.path}/uio/{name}"
        numbers = [f"MAJOR=240\nMINOR={device.uio}\nDEVNAME={name}\n", f"240:{device.uio}\n"]
        bus.tree.folder(
            path,
            [
                ("name", "igb_uio\n", 0o444),
                ("version", "0.1\n", 0o444),
                ("uevent", numbers[0], 0o644),
                ("dev", numbers[1], 0o444),
            ],
        )
        bus.tree.link(f"{path}/device", device.path)
        bus.tree.link(f"{path}/subsystem", "class/uio")
        bus.tree.link(f"class/uio/{name}", path)
        bus.other_event("add", path, "uio", *numbers[0].split())

    def remove(self, bus: Bus, device: Device) -> None:
        """An open /dev/uioN does not hold it up."""
        assert device.uio is not None  # noqa: S101 - for the type checker
        name = f"uio{device.uio}"
        bus.tree.unlink(f"class/uio/{name}")
        bus.other_event(
            "remove", f"{device.path}/uio/{name}", "uio", "MAJOR=240", f"MINOR={device.uio}", f"DEVNAME={name}"
        )
        bus.tree.remove_folder(f"{device.path}/uio")
        bus.uio_numbers.give_back(device.uio)
        device.uio = None


class QatPf(Driver):
    """The QAT PF driver: qat/ (Gen4 and later), debugfs, and SR-IOV as it does it."""

    def probe(self, bus: Bus, device: Device) -> None:
        """The device is brought up with its first configuration; its VFs are not enabled."""
        qat = device.qat
        if qat is None:
            raise failure(errno.ENODEV)
        qat.up, qat.services, qat.auto_reset = True, qat.pf.services or "", qat.pf.auto_reset
        qat.pm_idle = qat.pf.pm_idle_enabled
        if qat.pf.has_qat_attributes:
            names = QAT_ATTRIBUTES if qat.pm_idle is None else (*QAT_ATTRIBUTES, _PM_IDLE)
            for name in names:
                device.shown.pop(name, None)
            bus.tree.folder(f"{device.path}/qat")
            bus.refresh(device, *names)
        bus.tree.folder(debugfs(device))
        self._show(bus, device)

    def remove(self, bus: Bus, device: Device) -> None:
        """adf_remove: down, and with it the VFs."""
        self.go_down(bus, device)
        bus.tree.remove_folder(debugfs(device))
        bus.tree.remove_folder(f"{device.path}/qat")

    def go_down(self, bus: Bus, device: Device) -> None:
        """adf_dev_down: not started any more, then the VFs go, which waits for those that are open."""
        if device.qat is not None and device.qat.up:
            device.qat.up = False
            self._show(bus, device)
        disable_sriov(bus, device)

    def go_up(self, bus: Bus, device: Device) -> None:
        """adf_dev_up: VFs stay as they are."""
        if device.qat is not None:
            device.qat.up = True
            self._show(bus, device)

    def configure_sriov(self, bus: Bus, device: Device, number: int) -> None:
        """adf_sriov_configure: any number but 0 enables all VFs; either way the device goes down and up again."""
        if number and not bus.iommu:
            raise failure(errno.EINVAL)
        self.go_down(bus, device)
        self.go_up(bus, device)
        if number:
            enable_sriov(bus, device)

    def _show(self, bus: Bus, device: Device) -> None:
        show_debugfs(bus, device)
        if device.qat is not None and device.qat.pf.has_qat_attributes:
            bus.refresh(device, "qat/state", "qat/cfg_services")


def debugfs(device: Device) -> str:
    """The device's folder of the QAT driver in debugfs."""
    return f"kernel/debug/qat_{PHYSICAL[device.device_id].driver}_{device.address}"


def show_debugfs(bus: Bus, device: Device) -> None:
    """Write what debugfs shows now: heartbeat/ is there while the device is up (adf_dbgfs_add, adf_dbgfs_rm)."""
    qat = device.qat
    if qat is None or not isinstance(device.driver, QatPf):
        return
    folder = debugfs(device)
    bus.tree.put(f"{folder}/dev_cfg", _dev_cfg(qat.pf.dev_cfg, qat.services), 0o400)
    heartbeat = f"{folder}/heartbeat"
    if not qat.up:
        bus.tree.remove_folder(heartbeat)
        return
    if not (bus.tree.root / heartbeat).exists():
        bus.tree.folder(heartbeat, [("config", "500\n", 0o600), ("queries_failed", "0\n", 0o400)])
    # With its NUL: adf_hb_status_read gives one byte more than the text has.
    bus.tree.put(f"{heartbeat}/status", f"{qat.heartbeat}\n\0", 0o400)


def _dev_cfg(text: str | None, services: str) -> str:
    if text is not None:
        return text
    general = f"ServicesEnabled = {services}\n" if services else ""
    return f"[KERNEL]\nNumberCyInstances = 0\nNumberDcInstances = 0\n[GENERAL]\n{general}"


def enable_sriov(
    bus: Bus, pf: Device, number: int | None = None, place: Callable[[Device], None] | None = None
) -> None:
    """sriov_enable: make the VFs (by default all) one by one, each offered to the drivers at once, or to `place`."""
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
        bus.event("change", vf)
        if place is not None:
            place(vf)
        elif bus.autoprobe:
            with bus.locked(vf):
                bus.attach(vf)
    pf.sriov.number = number
    bus.refresh(pf, "sriov_numvfs")
    bus.event("change", pf)


def disable_sriov(bus: Bus, pf: Device) -> None:
    """sriov_disable: remove the VFs in order; waits at the first that is open, with the ones before it gone."""
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


def make_driver(name: str, *, noiommu: bool = False) -> Driver:
    """The driver of a name, as modprobe would find it; an unknown one takes no device by itself."""
    if name == "vfio-pci":
        return NoIommuVfioPci(name) if noiommu else VfioPci(name)
    if name == "igb_uio":
        return IgbUio(name)
    module = _MODULES.get(name, f"qat_{name}")
    physical = frozenset((VENDOR_INTEL, number) for number, kind in PHYSICAL.items() if kind.driver == name)
    if physical:
        return QatPf(name, physical, module)
    virtual = frozenset((VENDOR_INTEL, number) for number, kind in VIRTUAL.items() if kind.driver == name)
    return Driver(name, virtual, module if virtual else "")
