"""What a write to each attribute does: the store functions of the emulated kernel, in tables by attribute.

Each is the kernel's own, step by step: drivers/base/bus.c (bind, unbind, drivers_probe), drivers/pci/pci-sysfs.c and
iov.c, qat_common/adf_sysfs.c. They raise OSError with the errno that the writer gets, and wait where the kernel waits.
"""

import errno
import string
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from qat_server.simulation.attributes import NOT_ON_VFS
from qat_server.simulation.bus import Bus
from qat_server.simulation.drivers import QatPf, show_debugfs
from qat_server.simulation.model import Device, Driver, failure
from qat_server.simulation.services import parse_services, services_allowed
from qat_shared.pci import PciAddress

PAGE: Final = 4096
UEVENT_ACTIONS: Final = ("add", "remove", "change", "move", "online", "offline", "bind", "unbind")


class Store(Struct, frozen=True):
    """One attribute that is being written: its name, the device that it is about, and what the write does."""

    attribute: str
    subject: str
    run: Callable[[], None]
    device: Device | None = None


def find(bus: Bus, path: str, data: bytes) -> Store:
    """The store of a path relative to the sysfs root. Raises OSError: ENODEV when its device went, EACCES."""
    text = data.partition(b"\0")[0].decode("latin-1")  # a C string to the store function
    parts = path.split("/")
    if parts[0] == "devices" and len(parts) > 3 and parts[1].startswith("pci"):
        return _device_store(bus, parts, text)
    if parts[:3] == ["bus", "pci", "drivers"] and len(parts) == 5:
        driver = bus.drivers.get(parts[3])
        if driver is None:
            raise failure(errno.ENODEV)
        if parts[4] in DRIVER_STORES:
            store = DRIVER_STORES[parts[4]]
            return Store(parts[4], line(text), lambda: store(bus, driver, text))
    if parts[:2] == ["bus", "pci"] and len(parts) == 3 and parts[2] in BUS_STORES:
        bus_store = BUS_STORES[parts[2]]
        return Store(parts[2], line(text), lambda: bus_store(bus, text))
    # debugfs opens a file for root whatever its mode, and then has no write function.
    raise failure(errno.EINVAL if path.startswith("kernel/debug/") else errno.EACCES)


def _device_store(bus: Bus, parts: list[str], text: str) -> Store:
    try:
        device = bus.devices.get(PciAddress.parse(parts[2]))
    except ValueError:
        device = None
    if device is None or device.path != "/".join(parts[:3]):
        raise failure(errno.ENODEV)
    name = "/".join(parts[3:])
    if device.physfn is not None and name in NOT_ON_VFS:
        raise failure(errno.ENOENT)
    store = DEVICE_STORES.get(name)
    if store is None:
        raise failure(errno.EACCES)
    if (name.startswith("sriov_") and device.sriov is None) or (
        name.startswith("qat/") and _qat_driver(device) is None
    ):
        raise failure(errno.ENODEV)
    return Store(name, str(device.address), lambda: store(bus, device, text), device)


# How the kernel reads what was written


def line(text: str) -> str:
    """Without the one newline at its end that does not count (sysfs_streq)."""
    return text.removesuffix("\n")


def unsigned(text: str, limit: int) -> int:
    """kstrtou*(buf, 0): decimal, 0x or 0 for octal. Raises OSError EINVAL; a negative or larger number is one too."""
    digits = line(text).removeprefix("+").lower()
    base = 16 if digits.startswith("0x") else 8 if digits.startswith("0") and len(digits) > 1 else 10
    digits = digits.removeprefix("0x") if base == 16 else digits
    if not digits or not set(digits) <= set(string.hexdigits[:base]):
        raise failure(errno.EINVAL)
    number = int(digits, base)
    if number > limit:
        raise failure(errno.EINVAL)
    return number


def boolean(text: str) -> bool:
    """kstrtobool: y, t, 1, on; n, f, 0, off; only the first letters count. Raises OSError EINVAL."""
    start = text[:2].lower()
    if start[:1] in ("y", "t", "1") or start == "on":
        return True
    if start[:1] in ("n", "f", "0") or start == "of":
        return False
    raise failure(errno.EINVAL)


def _named(bus: Bus, text: str) -> Device | None:
    """bus_find_device_by_name."""
    try:
        return bus.devices.get(PciAddress.parse(line(text)))
    except ValueError:
        return None


def _alive(device: Device) -> None:
    if device.dead:
        raise failure(errno.ENODEV)


# Devices


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


def _rescan(bus: Bus, device: Device, text: str) -> None:
    _bus_rescan(bus, text)


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


def _qat_driver(device: Device) -> QatPf | None:
    if device.qat is not None and device.qat.pf.has_qat_attributes and isinstance(device.driver, QatPf):
        return device.driver
    return None


def _state(bus: Bus, device: Device, text: str) -> None:
    wanted = line(text)
    if wanted not in ("up", "down"):
        raise failure(errno.EINVAL)
    # The driver's own lock; the device's stands for it.
    with bus.locked(device):
        driver = _qat_driver(device)
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


# Drivers


def _bind(bus: Bus, driver: Driver, text: str) -> None:
    device = _named(bus, text)
    if device is None or not driver.matches(device):
        raise failure(errno.ENODEV)
    with bus.locked(device):
        bus.probe(driver, device)


def _unbind(bus: Bus, driver: Driver, text: str) -> None:
    device = _named(bus, text)
    if device is None or device.driver is not driver:
        raise failure(errno.ENODEV)
    with bus.locked(device):
        if device.driver is driver:  # somebody may have been quicker: that is no error
            bus.detach(device)


def _ids(text: str) -> tuple[int, int]:
    """The first two of the hexadecimal numbers. Raises OSError EINVAL."""
    try:
        vendor, device, *_ = (int(word, 16) for word in text.split())
    except ValueError:
        raise failure(errno.EINVAL) from None
    return vendor, device


def _new_id(bus: Bus, driver: Driver, text: str) -> None:
    ids = _ids(text)
    if ids in driver.ids or ids in driver.dynamic:
        raise failure(errno.EEXIST)
    driver.dynamic.add(ids)
    bus.attach_all(driver)


def _remove_id(bus: Bus, driver: Driver, text: str) -> None:
    ids = _ids(text)
    if ids not in driver.dynamic:
        raise failure(errno.ENODEV)
    driver.dynamic.remove(ids)


def _driver_uevent(bus: Bus, driver: Driver, text: str) -> None:
    action = line(text).partition(" ")[0]
    if action not in UEVENT_ACTIONS:
        raise failure(errno.EINVAL)
    bus.other_event(action, driver.path, "drivers", "SYNTH_UUID=0")


DRIVER_STORES: Final[dict[str, Callable[[Bus, Driver, str], None]]] = {
    "bind": _bind,
    "unbind": _unbind,
    "new_id": _new_id,
    "remove_id": _remove_id,
    "uevent": _driver_uevent,
}


# The bus


def _drivers_probe(bus: Bus, text: str) -> None:
    device = _named(bus, text)
    if device is None:
        raise failure(errno.ENODEV)
    if device.driver is not None:  # also while its driver is letting go of it
        return
    with bus.locked(device):
        if device.dead:
            raise failure(errno.EINVAL)
        bus.attach(device)  # that nobody took it is no error


def _drivers_autoprobe(bus: Bus, text: str) -> None:
    bus.autoprobe = not text.startswith("0")
    bus.tree.put("bus/pci/drivers_autoprobe", f"{int(bus.autoprobe)}\n", 0o644)


def _bus_rescan(bus: Bus, text: str) -> None:
    if unsigned(text, 2**64 - 1):
        bus.rescan()


BUS_STORES: Final[dict[str, Callable[[Bus, str], None]]] = {
    "drivers_probe": _drivers_probe,
    "drivers_autoprobe": _drivers_autoprobe,
    "rescan": _bus_rescan,
}
