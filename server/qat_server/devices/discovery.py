"""Discovery: a sysfs tree in, an immutable Inventory out. It only reads, and makes no decision about what it finds.

On a host, the PFs are the devices bound to the PF driver of each selected VF driver, and the VFs are the targets of
their virtfnN links. If no such driver has a device (inside a VM), every PCI device with the id of a selected VF is a VF
without a PF.

A partial discovery runs the same code as a full one. It reuses those parts of the previous inventory that depend only
on the files of a single device that has not changed (`_Reusable`).
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from qat_server.devices.function_reader import READ_ERRORS, error_text, read_pf, read_vf
from qat_server.devices.inventory import Inventory, PhysicalFunction, Problem, VirtualFunction
from qat_server.devices.pci_bus import driver_addresses, pci_addresses, pf_driver_of
from qat_shared.devices import VENDOR_INTEL, VIRTUAL
from qat_shared.pci import PciAddress
from qat_shared.sysfs import PciDevice, open_device

_VfsWithPf = list[tuple[PciAddress, PciAddress | None]]
"""VFs in address order, each with its PF."""


class _Reusable(Struct, frozen=True):
    """The parts of the previous inventory that are still valid; nothing of the `invalidated` devices is among them.

    `cut` are VFs without a PF that were over the limit. `skip_others` means that every other device on the bus is known
    not to be a selected VF.
    """

    pfs: dict[PciAddress, PhysicalFunction] = {}
    vfs: dict[PciAddress, VirtualFunction] = {}
    cut: frozenset[PciAddress] = frozenset()
    invalidated: frozenset[PciAddress] = frozenset()
    skip_others: bool = False


def discover(
    sysfs_root: Path,
    vf_drivers: Sequence[str],
    max_devices: int,
    previous: Inventory | None = None,
    changed: Collection[PciAddress] | None = None,
) -> Inventory:
    """Find all PFs and VFs of the selected kernel VF drivers, the first `max_devices` usable VFs in address order.

    With `previous` (of the same root and drivers) and `changed`, only the named devices, their PFs and the devices with
    problems are read again; other changes are missed. A device that cannot be read, or does not match its driver and
    links, becomes a Problem. Raises SysfsError when sysfs_root has no readable PCI bus.
    """
    reusable = _Reusable()
    if previous is not None and changed is not None:
        reusable = _reusable(sysfs_root, previous, frozenset(changed))
    problems: list[Problem] = []
    candidates = list(_pf_candidates(sysfs_root, vf_drivers, problems))
    pfs: list[PhysicalFunction] = []
    if candidates:
        pfs = _pfs(sysfs_root, candidates, reusable, problems)
        found = _vfs_of(pfs, problems)
    else:
        found = _vfs_without_pf(sysfs_root, frozenset(vf_drivers), reusable, problems)
    vfs: list[VirtualFunction] = []
    cut: list[PciAddress] = []
    for address, pf in found:
        if len(vfs) >= max_devices:
            cut.append(address)
            continue
        vf = reusable.vfs.get(address)
        if vf is None or vf.pf != pf:
            try:
                vf = read_vf(sysfs_root, address, pf, vf_drivers)
            except READ_ERRORS as error:
                problems.append(Problem(address, error_text(error)))
                continue
        vfs.append(vf)
    problems.sort(key=lambda problem: (str(problem.address), problem.text))
    return Inventory(tuple(pfs), tuple(vfs), tuple(cut), tuple(problems))


def _reusable(root: Path, previous: Inventory, changed: frozenset[PciAddress]) -> _Reusable:
    invalidated = changed | {problem.address for problem in previous.problems if problem.address is not None}
    members = {pf.address for pf in previous.pfs}.union(*(pf.vfs for pf in previous.pfs))
    without_pfs = not previous.pfs and bool(previous.vfs)  # so discovery has read every device on the bus
    # If no PF lists a changed VF, that VF is new and the links of its PF have changed.
    pfs_of_new_vfs = {_physfn(root, address) for address in changed - members}
    return _Reusable(
        pfs={
            pf.address: pf
            for pf in previous.pfs
            if pf.address not in invalidated and pf.address not in pfs_of_new_vfs and invalidated.isdisjoint(pf.vfs)
        },
        vfs={vf.address: vf for vf in previous.vfs if vf.address not in invalidated},
        cut=frozenset(previous.cut) - invalidated if without_pfs else frozenset(),
        invalidated=invalidated,
        skip_others=without_pfs,
    )


def _physfn(root: Path, address: PciAddress) -> PciAddress | None:
    try:
        with open_device(root, address) as device:
            return device.linked_address("physfn")
    except READ_ERRORS:
        return None  # either no PF links to this device, or reading it through its PF reports the error


def _pf_candidates(
    root: Path, vf_drivers: Sequence[str], problems: list[Problem]
) -> Iterator[tuple[str, PciAddress | None]]:
    """Each device bound to a PF driver, with the driver.

    None stands for the devices of a driver that cannot be listed: the driver is loaded, so this is not a VM.
    """
    for driver in dict.fromkeys(map(pf_driver_of, vf_drivers)):
        try:
            for address in driver_addresses(root, driver):
                yield driver, address
        except OSError as error:
            problems.append(Problem(None, f"bus/pci/drivers/{driver}: {error_text(error)}"))
            yield driver, None


def _pfs(
    root: Path, candidates: list[tuple[str, PciAddress | None]], reusable: _Reusable, problems: list[Problem]
) -> list[PhysicalFunction]:
    pfs = []
    for driver, address in candidates:
        if address is None:
            continue
        pf = reusable.pfs.get(address)
        if pf is None or pf.driver != driver:
            try:
                pf = read_pf(root, address, driver, problems)
            except READ_ERRORS as error:
                problems.append(Problem(address, error_text(error)))
                continue
        pfs.append(pf)
    return sorted(pfs, key=lambda pf: pf.address)


def _vfs_of(pfs: list[PhysicalFunction], problems: list[Problem]) -> _VfsWithPf:
    owners: dict[PciAddress, PciAddress | None] = {}
    for pf in pfs:
        for address in pf.vfs:
            if owners.setdefault(address, pf.address) != pf.address:
                problems.append(Problem(pf.address, f"its virtfn links name {address}, which is a VF of another PF"))
    return sorted(owners.items())


def _vfs_without_pf(root: Path, vf_drivers: frozenset[str], reusable: _Reusable, problems: list[Problem]) -> _VfsWithPf:
    found: _VfsWithPf = []
    for address in pci_addresses(root):
        if address in reusable.vfs or address in reusable.cut:
            found.append((address, None))
        elif not reusable.skip_others or address in reusable.invalidated:
            try:
                with open_device(root, address) as device:
                    selected = device.read_int("vendor", 16) == VENDOR_INTEL and _is_selected_vf(device, vf_drivers)
            except READ_ERRORS as error:
                problems.append(Problem(address, error_text(error)))
                continue
            if selected:
                found.append((address, None))
    return found


def _is_selected_vf(device: PciDevice, vf_drivers: Collection[str]) -> bool:
    kind = VIRTUAL.get(device.read_int("device", 16))
    return kind is not None and kind.driver in vf_drivers
