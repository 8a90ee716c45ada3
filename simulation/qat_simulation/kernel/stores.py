"""Finds the store function (what a write to an attribute does) for a write, and has those of drivers and of the bus.

They follow the kernel's drivers/base/bus.c (bind, unbind, drivers_probe) step by step; device_stores.py has those of
devices. All raise OSError with the errno that the writer gets, and wait where the kernel waits.
"""

import errno
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from qat_shared.pci import PciAddress
from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.device_stores import DEVICE_STORES, UEVENT_ACTIONS, qat_driver, rescan_bus
from qat_simulation.kernel.model import Device, Driver, os_error
from qat_simulation.kernel.sysfs.attributes import NOT_ON_VFS, line


class Store(Struct, frozen=True):
    """A write to be done: the attribute's name, the device's address (as written, for bus-wide files), the function.

    `device` is the device whose own file is written.
    """

    attribute: str
    subject: str
    run: Callable[[], None]
    device: Device | None = None


def find(bus: Bus, path: str, data: bytes) -> Store:
    """The store for a path relative to the sysfs root. Raises OSError: ENODEV if its device is gone, else EACCES.

    It is EINVAL in debugfs, and ENOENT for the attributes that VFs do not have.
    """
    text = data.partition(b"\0")[0].decode("latin-1")  # the store function gets a C string
    parts = path.split("/")
    if parts[0] == "devices" and len(parts) > 3 and parts[1].startswith("pci"):
        return _device_store(bus, parts, text)
    if parts[:3] == ["bus", "pci", "drivers"] and len(parts) == 5:
        driver = bus.drivers.get(parts[3])
        if driver is None:
            raise os_error(errno.ENODEV)
        if parts[4] in DRIVER_STORES:
            store = DRIVER_STORES[parts[4]]
            return Store(parts[4], line(text), lambda: store(bus, driver, text))
    if parts[:2] == ["bus", "pci"] and len(parts) == 3 and parts[2] in BUS_STORES:
        bus_store = BUS_STORES[parts[2]]
        return Store(parts[2], line(text), lambda: bus_store(bus, text))
    # In debugfs root can open any file, whatever its mode, and write(2) then finds no write function.
    raise os_error(errno.EINVAL if path.startswith("kernel/debug/") else errno.EACCES)


def _device_store(bus: Bus, parts: list[str], text: str) -> Store:
    try:
        device = bus.devices.get(PciAddress.parse(parts[2]))
    except ValueError:
        device = None
    if device is None or device.path != "/".join(parts[:3]):
        raise os_error(errno.ENODEV)
    name = "/".join(parts[3:])
    if device.physfn is not None and name in NOT_ON_VFS:
        raise os_error(errno.ENOENT)
    store = DEVICE_STORES.get(name)
    if store is None:
        raise os_error(errno.EACCES)
    if (name.startswith("sriov_") and device.sriov is None) or (name.startswith("qat/") and qat_driver(device) is None):
        raise os_error(errno.ENODEV)
    return Store(name, str(device.address), lambda: store(bus, device, text), device)


# Drivers


def _named(bus: Bus, text: str) -> Device | None:
    """bus_find_device_by_name."""
    try:
        return bus.devices.get(PciAddress.parse(line(text)))
    except ValueError:
        return None


def _bind(bus: Bus, driver: Driver, text: str) -> None:
    device = _named(bus, text)
    if device is None or not driver.matches(device):
        raise os_error(errno.ENODEV)
    with bus.locked(device):
        bus.probe(driver, device)


def _unbind(bus: Bus, driver: Driver, text: str) -> None:
    device = _named(bus, text)
    if device is None or device.driver is not driver:
        raise os_error(errno.ENODEV)
    with bus.locked(device):
        if device.driver is driver:  # another writer may have been quicker: that is no error
            bus.detach(device)


def _ids(text: str) -> tuple[int, int]:
    """The first two of the hexadecimal numbers. Raises OSError (EINVAL)."""
    try:
        vendor, device, *_ = (int(word, 16) for word in text.split())
    except ValueError:
        raise os_error(errno.EINVAL) from None
    return vendor, device


def _new_id(bus: Bus, driver: Driver, text: str) -> None:
    ids = _ids(text)
    if ids in driver.ids or ids in driver.dynamic:
        raise os_error(errno.EEXIST)
    driver.dynamic.add(ids)
    bus.attach_all(driver)


def _remove_id(bus: Bus, driver: Driver, text: str) -> None:
    ids = _ids(text)
    if ids not in driver.dynamic:
        raise os_error(errno.ENODEV)
    driver.dynamic.remove(ids)


def _driver_uevent(bus: Bus, driver: Driver, text: str) -> None:
    action = line(text).partition(" ")[0]
    if action not in UEVENT_ACTIONS:
        raise os_error(errno.EINVAL)
    bus.send_event(action, driver.path, "drivers", "SYNTH_UUID=0")


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
        raise os_error(errno.ENODEV)
    if device.driver is not None:  # also while its driver is releasing it
        return
    with bus.locked(device):
        if device.dead:
            raise os_error(errno.EINVAL)
        bus.attach(device)  # it is no error that no driver accepted it


def _drivers_autoprobe(bus: Bus, text: str) -> None:
    bus.autoprobe = not text.startswith("0")
    bus.tree.put("bus/pci/drivers_autoprobe", f"{int(bus.autoprobe)}\n", 0o644)


BUS_STORES: Final[dict[str, Callable[[Bus, str], None]]] = {
    "drivers_probe": _drivers_probe,
    "drivers_autoprobe": _drivers_autoprobe,
    "rescan": rescan_bus,
}
