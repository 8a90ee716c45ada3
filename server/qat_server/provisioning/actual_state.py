"""The actual state of a PF beyond the inventory, and its reader. Never writes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from msgspec import Struct

from qat_server.devices.inventory import PhysicalFunction, Problem
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress
from qat_shared.sysfs import MalformedError, MissingError, PciDevice, SysfsError, open_device

_MOST_VFS: Final = 0xFFFF
# auto_reset shows words, pm_idle_enabled digits (adf_sysfs.c).
_ON_OFF: Final = {"on": True, "off": False, "1": True, "0": False}


class ActualState(Struct, frozen=True):
    """The attributes of a PF that a plan needs beyond the inventory; None where the driver has no such attribute.

    `open_vfs` are the VFs that a process holds open, including those beyond --max-num-devices.
    """

    auto_reset: bool | None
    pm_idle_enabled: bool | None
    num_vfs: int
    total_vfs: int
    open_vfs: tuple[PciAddress, ...] = ()


def read_actual_states(
    sysfs_root: Path, pfs: Iterable[PhysicalFunction], open_vfs: bool = True
) -> dict[PciAddress, ActualState | Problem]:
    """`read_actual_state` of each PF, or the Problem that prevents it."""
    states: dict[PciAddress, ActualState | Problem] = {}
    for pf in pfs:
        try:
            states[pf.address] = read_actual_state(sysfs_root, pf.address, open_vfs)
        except SysfsError as error:
            states[pf.address] = Problem(pf.address, f"{error.path}: {error.why}")
    return states


def read_actual_state(sysfs_root: Path, address: PciAddress, open_vfs: bool = True) -> ActualState:
    """Read a PF's attributes and, with `open_vfs`, which of its VFs are open (three reads for each VF).

    Raises SysfsError.
    """
    with open_device(sysfs_root, address) as device:
        vfs = [vf for _, vf in device.virtual_functions()]
        return ActualState(
            auto_reset=_switch(device, "qat/auto_reset"),
            pm_idle_enabled=_switch(device, "qat/pm_idle_enabled"),
            # Not sriov_numvfs: reading it waits for any writer, possibly for ever.
            num_vfs=len(vfs),
            total_vfs=_count(device, "sriov_totalvfs"),
            open_vfs=tuple(vf for vf in vfs if open_vfs and isinstance(vf, PciAddress) and _is_open(sysfs_root, vf)),
        )


def _is_open(sysfs_root: Path, address: PciAddress) -> bool:
    try:
        with open_device(sysfs_root, address) as vf:
            # Only vfio-pci enables a device when it is opened; other drivers do so when they bind. A VF without a
            # driver may be one whose unbind from vfio-pci waits for its user.
            return vf.link("driver") in (DpdkDriver.VFIO_PCI, None) and vf.read("enable") != "0"
    except MissingError:
        return False
    except SysfsError:
        return True  # unknown, so assume that it is open


def _switch(device: PciDevice, name: str) -> bool | None:
    text = device.read_optional(name)
    if text is None:
        return None
    if text not in _ON_OFF:
        raise MalformedError(str(device.address), name, f"{text[:40]!r} is neither on nor off")
    return _ON_OFF[text]


def _count(device: PciDevice, name: str) -> int:
    text = device.read_optional(name)
    if text is None:
        return 0  # a PF without SR-IOV
    if not (text.isascii() and text.isdecimal()) or len(text) > 5 or int(text) > _MOST_VFS:
        raise MalformedError(str(device.address), name, f"{text[:40]!r} is not a number of VFs")
    return int(text)
