"""SetServices, SetPmIdle, SetAutoReset, SetNumVfs: the kernel's steps for making a PF what it is wanted to be.

    <PF>/qat/state                      down, up: going down takes the VFs away
    <PF>/qat/cfg_services               written while down
    <PF>/qat/pm_idle_enabled            written while down
    <PF>/qat/auto_reset                 written at any time
    <PF>/sriov_drivers_autoprobe        0: new VFs are left to no driver
    <PF>/sriov_numvfs                   all VFs, or 0

Taking VFs away waits inside the kernel for whoever has one open, so it is refused while anybody has. Each operation
may end anywhere (the helper can be killed): asked for again, it leads from there to the same end.
Source: the kernel's Documentation/ABI/testing/sysfs-driver-qat and drivers/crypto/intel/qat/qat_common/adf_sysfs.c.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from qat_helper.errors import UNSIGNED, OperationError, denied
from qat_helper.node import Node, Outcome
from qat_helper.policy import check_own_driver
from qat_helper.writing import write
from qat_shared.devices import PHYSICAL
from qat_shared.messages import (
    DpdkDriver,
    ErrorCode,
    Provisioned,
    Request,
    Service,
    SetAutoReset,
    SetNumVfs,
    SetPmIdle,
    SetServices,
)
from qat_shared.pci import PciAddress
from qat_shared.sysfs import MissingError, PciDevice, open_device

_STATE: Final = "qat/state"
_NUM_VFS: Final = "sriov_numvfs"


def set_services(node: Node, request: SetServices) -> Outcome:
    """Down, write, up; the old ones again, if the kernel does not take these. Raises OperationError, SysfsError."""
    text = ";".join(service for service in Service if service in request.services)
    with _pf(node, request.address) as pf:
        return _set_while_down(node, request, pf, "qat/cfg_services", text)


def set_pm_idle(node: Node, request: SetPmIdle) -> Outcome:
    """Down, write, and up unless it is to stay down. Raises OperationError, SysfsError."""
    with _pf(node, request.address) as pf:
        return _set_while_down(node, request, pf, "qat/pm_idle_enabled", str(int(request.on)), request.stay_down)


def set_auto_reset(node: Node, request: SetAutoReset) -> Outcome:
    """Takes nothing away. Raises OperationError, SysfsError."""
    name, text = "qat/auto_reset", "on" if request.on else "off"
    with _pf(node, request.address) as pf:
        before = _shown(pf, name)
        if before != text:
            _write(pf, name, text)
        return _outcome(request, before, _checked(pf, name, text))


def set_num_vfs(node: Node, request: SetNumVfs) -> Outcome:
    """Enable or remove the VFs, unless that is so already. Raises OperationError, SysfsError."""
    with _pf(node, request.address) as pf:
        total = pf.read_int("sriov_totalvfs")
        if request.count > total:
            raise denied("vf-count", f"{pf.address} can have {total} VFs at most")
        if request.count:
            node.policy.check_vf_count(pf.address, total)  # the QAT driver enables all, whatever number is written
        before = _shown(pf, _NUM_VFS)
        if (before != "0") != (request.count != 0):
            if request.count == 0:
                _check_free(node, pf)
            # Else each new VF goes to the kernel's VF driver first. Binding by driver_override works all the same.
            _write(pf, "sriov_drivers_autoprobe", "0" if request.count else "1")
            _write(pf, _NUM_VFS, str(request.count))
        now = _shown(pf, _NUM_VFS)
        if (now != "0") != (request.count != 0):
            raise OperationError(ErrorCode.KERNEL, f"{pf.address} has {now} VFs after its number was set")
        return _outcome(request, before, now)


def _set_while_down(
    node: Node, request: Request, pf: PciDevice, name: str, text: str, stay_down: bool = False
) -> Outcome:
    before, state, end = _shown(pf, name), _shown(pf, _STATE), "down" if stay_down else "up"
    if _same(before, text) and state == end:
        return _outcome(request, before, before)
    _check_free(node, pf)
    _write(pf, _STATE, "down")
    try:
        _write(pf, name, text)
        if not stay_down:
            _write(pf, _STATE, "up")
    except OperationError as error:
        for attribute, old in ((name, before), (_STATE, "up")):
            try:
                _write(pf, attribute, old)
            except OperationError as another:
                if another.message not in error.message:
                    error.message += f"; and then: {another.message}"
        raise
    _checked(pf, _STATE, end)
    return _outcome(request, before, _checked(pf, name, text))


def _outcome(request: Request, before: str, now: str) -> Outcome:
    return Outcome(Provisioned(id=request.id, audit=UNSIGNED, before=before, now=now))


def _same(one: str, other: str) -> bool:
    """The order of services does not count."""
    return sorted(one.split(";")) == sorted(other.split(";"))


def _checked(pf: PciDevice, name: str, text: str) -> str:
    """What an attribute shows after `text` was written. Raises OperationError when that is not the same."""
    now = _shown(pf, name)
    if not _same(now, text):
        raise OperationError(ErrorCode.KERNEL, f"{pf.address}: {name} shows {now!r} after {text!r} was written")
    return now


def _shown(pf: PciDevice, name: str) -> str:
    text = pf.read_optional(name)
    if text is None:
        raise OperationError(ErrorCode.UNAVAILABLE, f"{pf.address} has no {name}: its driver or kernel is without it")
    return text[:60]


def _write(pf: PciDevice, name: str, text: str) -> None:
    write(pf, name, text, f"write {text!r} to {name}")


def _check_free(node: Node, pf: PciDevice) -> None:
    """Its VFs can be taken away, and that will not block. Raises OperationError, SysfsError."""
    for _, address in pf.virtual_functions():
        if not isinstance(address, PciAddress):
            raise address
        try:
            with open_device(node.sysfs_root, address) as vf:
                kernel_driver, driver = node.policy.check_virtual(vf), vf.link("driver")
                check_own_driver(address, driver, kernel_driver)
                # Without a driver, but enabled: one that is being taken from vfio-pci, and waits for its user.
                if driver in (DpdkDriver.VFIO_PCI, None) and vf.read("enable") != "0":
                    raise OperationError(
                        ErrorCode.BUSY,
                        f"{address}, a VF of {pf.address}, is held open: try again when its user has ended",
                    )
        except MissingError:
            continue  # removed by hand


@contextmanager
def _pf(node: Node, address: PciAddress) -> Iterator[PciDevice]:
    """A PF of the table that is provisioned and has its own driver. Raises OperationError, SysfsError."""
    with open_device(node.sysfs_root, address) as device:
        driver = node.policy.check_physical(device)
        kind = PHYSICAL.get(device.read_int("device", 16))
        if kind is not None and not kind.provisioned:
            raise denied("not-provisioned", f"{address} is of a kind that is not provisioned")
        if driver and device.link("driver") != driver:
            raise OperationError(ErrorCode.UNAVAILABLE, f"{address} is not bound to {driver}, the driver of its kind")
        yield device
