"""Discovery: a sysfs tree in, an immutable Inventory out. Only reads; decides nothing about what is found.

On a host, the PFs are the devices on the PF driver beside each selected VF driver, and their VFs are what their
virtfnN links name. Where no such driver has a device (inside a VM), every PCI device with a selected VF id is a VF
without PF.

A look at some devices only takes the same path as a look at all. It differs in what it carries over from the inventory
before (`_Known`): pieces that depend on nothing but the files of one device which was not named as changed.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from qat_server.devices.functions import UNREADABLE, read_pf, read_vf, sentence
from qat_server.devices.inventory import Inventory, PhysicalFunction, Problem, VirtualFunction
from qat_server.devices.pci_bus import driver_addresses, pci_addresses, pf_driver_of
from qat_shared.devices import VENDOR_INTEL, VIRTUAL
from qat_shared.pci import PciAddress
from qat_shared.sysfs import PciDevice, SysfsError, open_device, pci_directory

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
                vf = read_vf(sysfs_root, address, pf, vf_drivers)
            except UNREADABLE as error:
                problems.append(Problem(address, sentence(error)))
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
    except UNREADABLE:
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
            problems.append(Problem(None, f"bus/pci/drivers/{driver}: {sentence(error)}"))
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
                pf = read_pf(root, address, driver, problems)
            except UNREADABLE as error:
                problems.append(Problem(address, sentence(error)))
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
        raise SysfsError(str(root), "bus/pci/devices", sentence(error)) from error
    for address in addresses:
        if address in known.vfs or address in known.unread:
            found.append((address, None))
        elif not known.others_skipped or address in known.stale:
            try:
                with open_device(root, address) as device:
                    ours = device.read_int("vendor", 16) == VENDOR_INTEL and _is_selected_vf(device, vf_drivers)
            except UNREADABLE as error:
                problems.append(Problem(address, sentence(error)))
                continue
            if ours:
                found.append((address, None))
    return found


def _is_selected_vf(device: PciDevice, vf_drivers: Collection[str]) -> bool:
    kind = VIRTUAL.get(device.read_int("device", 16))
    return kind is not None and kind.driver in vf_drivers
