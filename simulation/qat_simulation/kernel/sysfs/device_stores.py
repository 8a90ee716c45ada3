"""What a write to each attribute of a device does: drivers/pci/pci-sysfs.c and iov.c, qat_common/adf_sysfs.c.

In a table by the attribute's name, for stores.py.
"""

import errno
from collections.abc import Callable
from typing import Final

from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.drivers import QatPf, show_debugfs
from qat_simulation.kernel.model import Device, failure
from qat_simulation.kernel.sysfs.written import boolean, line, unsigned
from qat_simulation.node.services import parse_services, services_allowed

PAGE: Final = 4096
UEVENT_ACTIONS: Final = ("add", "remove", "change", "move", "online", "offline", "bind", "unbind")


def _alive(device: Device) -> None:
    if device.dead:
        raise failure(errno.ENODEV)


def _driver_override(bus: Bus, device: Device, text: str) -> None:
    if len(text) >= PAGE - 1:
        raise failure(errno.EINVAL)
    with bus.locked(device):
        _alive(device)
        device.override = text.partition("\n")[0] or None
        bus.refresh(device, "driver_override")


def _privileged(bus: Bus, device: Device, text: str) -> None:
    raise failure(errno.EPERM)  # needs CAP_SYS_ADMIN, which no process of ours has


def _uevent(bus: Bus, device: Device, text: str) -> None:
    action = line(text).partition(" ")[0]
    if action not in UEVENT_ACTIONS:
        raise failure(errno.EINVAL)
    bus.other_event(action, device.path, "pci", "SYNTH_UUID=0", *device.uevent_fields)


def _remove(bus: Bus, device: Device, text: str) -> None:
    if unsigned(text, 2**64 - 1):
        with bus.locked(device):
            bus.remove_device(device)


def rescan_bus(bus: Bus, text: str) -> None:
    """The bus's own rescan; each device has one, too."""
    if unsigned(text, 2**64 - 1):
        bus.rescan()


def _rescan(bus: Bus, device: Device, text: str) -> None:
    rescan_bus(bus, text)


def _sriov_numvfs(bus: Bus, device: Device, text: str) -> None:
    number = unsigned(text, 0xFFFF)
    sriov = device.sriov
    assert sriov is not None  # noqa: S101 - `find` has looked
    if number > sriov.pf.total_vfs:
        raise failure(errno.ERANGE)
    with bus.locked(device):
        _alive(device)
        if number == sriov.number:
            return
        if not isinstance(device.driver, QatPf):
            raise failure(errno.ENOENT)  # no driver, or one that does not do SR-IOV
        if number and sriov.number:
            raise failure(errno.EBUSY)
        device.driver.configure_sriov(bus, device, number)


def _sriov_autoprobe(bus: Bus, device: Device, text: str) -> None:
    assert device.sriov is not None  # noqa: S101 - `find` has looked
    device.sriov.autoprobe = boolean(text)
    bus.refresh(device, "sriov_drivers_autoprobe")


def qat_driver(device: Device) -> QatPf | None:
    """The driver that has given the device its qat/ attributes, None when it has none."""
    if device.qat is not None and device.qat.pf.has_qat_attributes and isinstance(device.driver, QatPf):
        return device.driver
    return None


def _state(bus: Bus, device: Device, text: str) -> None:
    wanted = line(text)
    if wanted not in ("up", "down"):
        raise failure(errno.EINVAL)
    # The driver's own lock; the device's stands for it.
    with bus.locked(device):
        driver = qat_driver(device)
        if driver is None or device.qat is None:
            raise failure(errno.ENODEV)
        if device.qat.up == (wanted == "up"):
            return
        if wanted == "up":
            driver.go_up(bus, device)
        else:
            driver.go_down(bus, device)


def _cfg_services(bus: Bus, device: Device, text: str) -> None:
    wanted, qat = line(text), device.qat
    services = parse_services(wanted)
    if qat is None or services is None or not services_allowed(device.device_id, wanted) or qat.up:
        raise failure(errno.EINVAL)
    qat.services = ";".join(services) if bus.canonical_services else wanted
    bus.refresh(device, "qat/cfg_services")
    show_debugfs(bus, device)


def _auto_reset(bus: Bus, device: Device, text: str) -> None:
    assert device.qat is not None  # noqa: S101 - `find` has looked
    device.qat.auto_reset = boolean(text)
    bus.refresh(device, "qat/auto_reset")


def _pm_idle_enabled(bus: Bus, device: Device, text: str) -> None:
    wanted, qat = boolean(text), device.qat
    if qat is None or qat.up:
        raise failure(errno.EINVAL)
    if qat.pm_idle is None:  # its driver has no such attribute
        raise failure(errno.ENODEV)
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
