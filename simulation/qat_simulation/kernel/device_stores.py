"""The store functions of devices' attributes, by name: drivers/pci/{pci-sysfs,iov}.c, qat_common/adf_sysfs.c.

They raise OSError with the errno that the writer gets, and wait where the kernel waits. stores.py finds and runs them.
"""

import errno
from collections.abc import Callable
from typing import Final

from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.drivers import QatPf, show_debugfs
from qat_simulation.kernel.model import Device, os_error
from qat_simulation.kernel.sysfs.attributes import boolean, line, unsigned
from qat_simulation.node.services import parse_services, services_allowed

PAGE: Final = 4096
UEVENT_ACTIONS: Final = ("add", "remove", "change", "move", "online", "offline", "bind", "unbind")


def _alive(device: Device) -> None:
    if device.dead:
        raise os_error(errno.ENODEV)


def _driver_override(bus: Bus, device: Device, text: str) -> None:
    if len(text) >= PAGE - 1:
        raise os_error(errno.EINVAL)
    with bus.locked(device):
        _alive(device)
        device.override = text.partition("\n")[0] or None
        bus.refresh(device, "driver_override")


def _privileged(bus: Bus, device: Device, text: str) -> None:
    raise os_error(errno.EPERM)  # needs CAP_SYS_ADMIN, which neither helper nor server has


def _uevent(bus: Bus, device: Device, text: str) -> None:
    action = line(text).partition(" ")[0]
    if action not in UEVENT_ACTIONS:
        raise os_error(errno.EINVAL)
    bus.send_event(action, device.path, "pci", "SYNTH_UUID=0", *device.uevent_fields)


def _remove(bus: Bus, device: Device, text: str) -> None:
    if unsigned(text, 2**64 - 1):
        with bus.locked(device):
            bus.remove_device(device)


def rescan_bus(bus: Bus, text: str) -> None:
    """The bus's rescan; each device has the same file."""
    if unsigned(text, 2**64 - 1):
        bus.rescan()


def _rescan(bus: Bus, device: Device, text: str) -> None:
    rescan_bus(bus, text)


def _sriov_numvfs(bus: Bus, device: Device, text: str) -> None:
    number = unsigned(text, 0xFFFF)
    sriov = device.sriov
    assert sriov is not None  # noqa: S101 - `find` has checked this
    if number > sriov.pf.total_vfs:
        raise os_error(errno.ERANGE)
    with bus.locked(device):
        _alive(device)
        if number == sriov.number:
            return
        if not isinstance(device.driver, QatPf):
            raise os_error(errno.ENOENT)  # no driver, or one without SR-IOV
        if number and sriov.number:
            raise os_error(errno.EBUSY)
        device.driver.configure_sriov(device, number)


def _sriov_autoprobe(bus: Bus, device: Device, text: str) -> None:
    assert device.sriov is not None  # noqa: S101 - `find` has checked this
    device.sriov.autoprobe = boolean(text)
    bus.refresh(device, "sriov_drivers_autoprobe")


def qat_driver(device: Device) -> QatPf | None:
    """The driver that has added the device's qat/ attributes, None without these."""
    if device.qat is not None and device.qat.pf.has_qat_attributes and isinstance(device.driver, QatPf):
        return device.driver
    return None


def _state(bus: Bus, device: Device, text: str) -> None:
    wanted = line(text)
    if wanted not in ("up", "down"):
        raise os_error(errno.EINVAL)
    # The kernel takes a lock of the QAT driver's; here the device's lock stands for it.
    with bus.locked(device):
        driver = qat_driver(device)
        if driver is None or device.qat is None:
            raise os_error(errno.ENODEV)
        if device.qat.up == (wanted == "up"):
            return
        if wanted == "up":
            driver.go_up(device)
        else:
            driver.go_down(device)


def _cfg_services(bus: Bus, device: Device, text: str) -> None:
    wanted, qat = line(text), device.qat
    services = parse_services(wanted)
    if qat is None or services is None or not services_allowed(device.device_id, wanted) or qat.up:
        raise os_error(errno.EINVAL)
    qat.services = ";".join(services) if bus.canonical_services else wanted
    bus.refresh(device, "qat/cfg_services")
    show_debugfs(bus, device)


def _auto_reset(bus: Bus, device: Device, text: str) -> None:
    assert device.qat is not None  # noqa: S101 - `find` has checked this
    device.qat.auto_reset = boolean(text)
    bus.refresh(device, "qat/auto_reset")


def _pm_idle_enabled(bus: Bus, device: Device, text: str) -> None:
    wanted, qat = boolean(text), device.qat
    if qat is None or qat.up:
        raise os_error(errno.EINVAL)
    if qat.pm_idle is None:  # the driver has no such attribute
        raise os_error(errno.ENODEV)
    qat.pm_idle = wanted
    bus.refresh(device, "qat/pm_idle_enabled")


DEVICE_STORES: Final[dict[str, Callable[[Bus, Device, str], None]]] = {
    "driver_override": _driver_override,
    "enable": _privileged,
    "numa_node": _privileged,
    "uevent": _uevent,
    "remove": _remove,
    "rescan": _rescan,
    "sriov_numvfs": _sriov_numvfs,
    "sriov_drivers_autoprobe": _sriov_autoprobe,
    "qat/state": _state,
    "qat/cfg_services": _cfg_services,
    "qat/auto_reset": _auto_reset,
    "qat/pm_idle_enabled": _pm_idle_enabled,
}
