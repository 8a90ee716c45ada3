"""Discovery: a sysfs tree in, an immutable Inventory out. Only reads; decides nothing about what is found.

On a host, the PFs are the devices on the PF driver beside each selected VF driver, and their VFs are what their
virtfnN links name. Where no such driver has a device (inside a VM), every PCI device with a selected VF id is a VF
without PF.

A look at some devices only takes the same path as a look at all. It differs in what it carries over from the inventory
before (`_Known`): pieces that depend on nothing but the files of one device which was not named as changed.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from qat_server.inventory import Inventory, PhysicalFunction, Problem, VirtualFunction
from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL, pf_driver_of
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress
from qat_shared.sysfs import (
    MalformedError,
    MissingError,
    PciDevice,
    SysfsError,
    driver_addresses,
    open_device,
    pci_addresses,
    pci_directory,
)

_NOIOMMU: Final = "vfio-noiommu"
_MOST: Final = 2**31 - 1  # the kernel's numbers (NUMA nodes, groups) are ints; protobuf refuses larger ones
_DRIVER_NAME: Final = re.compile(r"[A-Za-z0-9_.+-]+", re.ASCII)
_UIO_NAME: Final = re.compile(r"uio[0-9]+", re.ASCII)
_UNREADABLE: Final = (SysfsError, OSError)

_Found = list[tuple[PciAddress, PciAddress | None]]
"""VFs in address order, each with its PF."""


class _Known(Struct, frozen=True):
    """What is carried over from the inventory before, without the devices that are `stale`.

    `unread` are lone VFs that were cut; `others_skipped` says that all other devices are known not to be ours.
    """

    pfs: dict[PciAddress, PhysicalFunction] = {}
    vfs: dict[PciAddress, VirtualFunction] = {}
    unread: frozenset[PciAddress] = frozenset()
    stale: frozenset[PciAddress] = frozenset()
    others_skipped: bool = False


def discover(
    sysfs_root: Path,
    vf_drivers: Sequence[str],
    max_devices: int,
    previous: Inventory | None = None,
    changed: Collection[PciAddress] | None = None,
) -> Inventory:
    """Find all PFs and VFs of the selected kernel VF drivers, the first `max_devices` usable VFs in address order.

    With `previous` (of the same root and drivers) and `changed`, only the devices named, their PFs, and what had a
    problem are read again; whatever else has changed since is not seen. A device that cannot be read, or is not what
    its place says, becomes a Problem. Raises SysfsError when sysfs_root has no readable PCI bus.
    """
    pci_directory(sysfs_root)
    known = _Known()
    if previous is not None and changed is not None:
        known = _known(sysfs_root, previous, frozenset(changed))
    problems: list[Problem] = []
    places = list(_pf_places(sysfs_root, vf_drivers, problems))
    pfs: list[PhysicalFunction] = []
    if places:
        pfs = _pfs(sysfs_root, places, known, problems)
        found = _vfs_of(pfs, problems)
    else:
        found = _lone_vfs(sysfs_root, frozenset(vf_drivers), known, problems)
    vfs: list[VirtualFunction] = []
    cut: list[PciAddress] = []
    for address, pf in found:
        if len(vfs) >= max_devices:
            cut.append(address)
            continue
        vf = known.vfs.get(address)
        if vf is None or vf.pf != pf:
            try:
                vf = _read_vf(sysfs_root, address, pf, vf_drivers)
            except _UNREADABLE as error:
                problems.append(Problem(address, _sentence(error)))
                continue
        vfs.append(vf)
    problems.sort(key=lambda problem: (str(problem.address), problem.text))
    return Inventory(tuple(pfs), tuple(vfs), tuple(cut), tuple(problems))


def _known(root: Path, previous: Inventory, changed: frozenset[PciAddress]) -> _Known:
    stale = changed | {problem.address for problem in previous.problems if problem.address is not None}
    members = {pf.address for pf in previous.pfs}.union(*(pf.vfs for pf in previous.pfs))
    lone = not previous.pfs and bool(previous.vfs)  # so all devices were looked at to find them
    # A VF that no PF was known to have: its PF's links are newer than what we have of it.
    pfs_of_new = {_physfn(root, address) for address in changed - members}
    return _Known(
        pfs={
            pf.address: pf
            for pf in previous.pfs
            if pf.address not in stale and pf.address not in pfs_of_new and stale.isdisjoint(pf.vfs)
        },
        vfs={vf.address: vf for vf in previous.vfs if vf.address not in stale},
        unread=frozenset(previous.cut) - stale if lone else frozenset(),
        stale=stale,
        others_skipped=lone,
    )


def _physfn(root: Path, address: PciAddress) -> PciAddress | None:
    try:
        with open_device(root, address) as device:
            return device.linked_address("physfn")
    except _UNREADABLE:
        return None  # whatever is wrong with it, no PF's links lead to it, or their reader finds out


def _pf_places(
    root: Path, vf_drivers: Sequence[str], problems: list[Problem]
) -> Iterator[tuple[str, PciAddress | None]]:
    """The PF drivers' devices. A driver that cannot be listed has None: it is there, so this is not a VM."""
    for driver in dict.fromkeys(map(pf_driver_of, vf_drivers)):
        try:
            for address in driver_addresses(root, driver):
                yield driver, address
        except OSError as error:
            problems.append(Problem(None, f"bus/pci/drivers/{driver}: {_sentence(error)}"))
            yield driver, None


def _pfs(
    root: Path, places: list[tuple[str, PciAddress | None]], known: _Known, problems: list[Problem]
) -> list[PhysicalFunction]:
    pfs = []
    for driver, address in places:
        if address is None:
            continue
        pf = known.pfs.get(address)
        if pf is None or pf.driver != driver:
            try:
                pf = _read_pf(root, address, driver, problems)
            except _UNREADABLE as error:
                problems.append(Problem(address, _sentence(error)))
                continue
        pfs.append(pf)
    return sorted(pfs, key=lambda pf: pf.address)


def _vfs_of(pfs: list[PhysicalFunction], problems: list[Problem]) -> _Found:
    owners: dict[PciAddress, PciAddress | None] = {}
    for pf in pfs:
        for address in pf.vfs:
            if owners.setdefault(address, pf.address) != pf.address:
                problems.append(Problem(pf.address, f"its virtfn links name {address}, which is a VF of another PF"))
    return sorted(owners.items())


def _lone_vfs(root: Path, vf_drivers: frozenset[str], known: _Known, problems: list[Problem]) -> _Found:
    found: _Found = []
    try:
        addresses = pci_addresses(root)
    except OSError as error:
        raise SysfsError(str(root), "bus/pci/devices", _sentence(error)) from error
    for address in addresses:
        if address in known.vfs or address in known.unread:
            found.append((address, None))
        elif not known.others_skipped or address in known.stale:
            try:
                with open_device(root, address) as device:
                    ours = device.read_int("vendor", 16) == VENDOR_INTEL and _is_selected_vf(device, vf_drivers)
            except _UNREADABLE as error:
                problems.append(Problem(address, _sentence(error)))
                continue
            if ours:
                found.append((address, None))
    return found


def _is_selected_vf(device: PciDevice, vf_drivers: Collection[str]) -> bool:
    kind = VIRTUAL.get(device.read_int("device", 16))
    return kind is not None and kind.driver in vf_drivers


def _read_pf(root: Path, address: PciAddress, driver: str, problems: list[Problem]) -> PhysicalFunction:
    with open_device(root, address) as device:
        device_id = _intel_device_id(device)
        kind = PHYSICAL.get(device_id)
        if kind is None or kind.driver != driver:
            raise MalformedError(str(address), "device", f"0x{device_id:04x} is not a QAT PF of driver {driver}")
        vfs = []
        for name, vf in device.virtual_functions():
            if isinstance(vf, PciAddress):
                vfs.append(vf)
            else:
                problems.append(Problem(address, f"{name}: {vf.why}"))
        return PhysicalFunction(
            address=address,
            device_id=device_id,
            driver=driver,
            numa_node=_numa_node(device),
            state=_qat_attribute(device, "qat/state", problems),
            services=_qat_attribute(device, "qat/cfg_services", problems),
            total_vfs=_total_vfs(device),
            vfs=tuple(sorted(set(vfs))),
        )


def _qat_attribute(device: PciDevice, name: str, problems: list[Problem]) -> str | None:
    try:
        return device.read_optional(name)
    except SysfsError as error:
        problems.append(Problem(device.address, _sentence(error)))
        return None


def _total_vfs(device: PciDevice) -> int:
    try:
        return _number(device, "sriov_totalvfs", device.read("sriov_totalvfs"))
    except MissingError:
        return 0  # a PF without SR-IOV, or with it turned off in the firmware


def _read_vf(root: Path, address: PciAddress, pf: PciAddress | None, vf_drivers: Sequence[str]) -> VirtualFunction:
    with open_device(root, address) as device:
        device_id = _intel_device_id(device)
        kind = VIRTUAL.get(device_id)
        if kind is None or kind.driver not in vf_drivers:
            raise MalformedError(str(address), "device", f"0x{device_id:04x} is not a VF of a selected driver")
        driver = _driver(device)
        on_vfio = driver == DpdkDriver.VFIO_PCI
        group = device.link("iommu_group")
        return VirtualFunction(
            address=address,
            device_id=device_id,
            driver=driver,
            pf=pf,
            numa_node=_numa_node(device),
            iommu_group=None if group is None else _number(device, "iommu_group", group),
            # Only vfio itself makes groups without an IOMMU, when it binds a device.
            noiommu=on_vfio and group is not None and device.read_optional("iommu_group/name") == _NOIOMMU,
            uio=_uio(device) if driver == DpdkDriver.IGB_UIO else None,
            # vfio-pci enables a device when it is opened; other drivers when they bind, so it says nothing there.
            in_use=device.read("enable") != "0" if on_vfio else None,
        )


def with_fresh_use(sysfs_root: Path, inventory: Inventory) -> Inventory:
    """The inventory with each `in_use` as it is now: opening and closing a device gives no uevent.

    What cannot be read stays as it was.
    """
    vfs = []
    for vf in inventory.vfs:
        if vf.driver == DpdkDriver.VFIO_PCI:
            try:
                with open_device(sysfs_root, vf.address) as device:
                    in_use = device.read("enable") != "0"
            except _UNREADABLE:
                in_use = bool(vf.in_use)
            vfs.append(vf if in_use == vf.in_use else replace(vf, in_use=in_use))
        else:
            vfs.append(vf)
    return replace(inventory, vfs=tuple(vfs))


def _intel_device_id(device: PciDevice) -> int:
    vendor = device.read_int("vendor", 16)
    if vendor != VENDOR_INTEL:
        raise MalformedError(str(device.address), "vendor", f"0x{vendor:04x} is not Intel")
    return device.read_int("device", 16)


def _driver(device: PciDevice) -> str | None:
    name = device.link("driver")
    if name is not None and not _DRIVER_NAME.fullmatch(name):
        raise MalformedError(str(device.address), "driver", "not a link to a driver")
    return name


def _numa_node(device: PciDevice) -> int | None:
    text = device.read_optional("numa_node")  # a kernel without NUMA has no such file
    return None if text is None or text == "-1" else _number(device, "numa_node", text)


def _uio(device: PciDevice) -> str | None:
    return next((name for name in device.names("uio") if _UIO_NAME.fullmatch(name)), None)


def _number(device: PciDevice, name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) > _MOST:
        raise MalformedError(str(device.address), name, f"{text[:40]!r} is not a number")
    return int(text)


def _sentence(error: SysfsError | OSError) -> str:
    if isinstance(error, SysfsError):
        return f"{error.path}: {error.why}"
    return os.strerror(error.errno or 0)
