"""SetServices, SetPmIdle, SetAutoReset, SetNumVfs: the kernel's steps for configuring a PF.

    <PF>/qat/state                      down, up; going down removes the VFs
    <PF>/qat/cfg_services               written while down
    <PF>/qat/pm_idle_enabled            written while down
    <PF>/qat/auto_reset                 written at any time
    <PF>/sriov_drivers_autoprobe        0: new VFs are not bound to a driver
    <PF>/sriov_numvfs                   all VFs, or 0

Removing VFs waits inside the kernel until no process has one open, so it is refused while the kernel shows one open
(not on igb_uio). This is the last of three checks: the server has made two before it asks. An operation
may stop at any step (the helper can be killed); repeating it from there leads to the same result.
Source: the kernel's Documentation/ABI/testing/sysfs-driver-qat and drivers/crypto/intel/qat/qat_common/adf_sysfs.c.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from qat_helper.errors import PENDING_HEAD, OperationError, denied
from qat_helper.operations.node import Node, Outcome
from qat_helper.operations.writing import write
from qat_helper.policy import deny_foreign
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
    """Down, write, up; if the kernel rejects the services, restore the old ones. Raises OperationError, SysfsError."""
    text = ";".join(service for service in Service if service in request.services)
    with _pf(node, request.address) as pf:
        return _set_while_down(node, request, pf, "qat/cfg_services", text)


def set_pm_idle(node: Node, request: SetPmIdle) -> Outcome:
    """Down, write, and up unless the request says `stay_down`. Raises OperationError, SysfsError."""
    with _pf(node, request.address) as pf:
        return _set_while_down(node, request, pf, "qat/pm_idle_enabled", str(int(request.on)), request.stay_down)


def set_auto_reset(node: Node, request: SetAutoReset) -> Outcome:
    """Set auto_reset; this removes no VFs. Raises OperationError, SysfsError."""
    name, text = "qat/auto_reset", "on" if request.on else "off"
    with _pf(node, request.address) as pf:
        before = _read(pf, name)
        if before != text:
            _write(pf, name, text)
        return _outcome(request, before, _read_back(pf, name, text))


def set_num_vfs(node: Node, request: SetNumVfs) -> Outcome:
    """Enable or remove all VFs, unless that is already done. Raises OperationError, SysfsError."""
    with _pf(node, request.address) as pf:
        total = pf.read_int("sriov_totalvfs")
        if request.count > total:
            raise denied("vf-count", f"{pf.address} can have at most {total} VFs")
        if request.count:
            node.policy.check_vf_count(pf.address, total)  # the QAT driver enables all, whatever number is written
        before = _read(pf, _NUM_VFS)
        if (before != "0") != (request.count != 0):
            if request.count == 0:
                _check_vfs_unused(node, pf)
            # Without this, the kernel's VF driver binds each new VF first. Binding by driver_override works either way.
            _write(pf, "sriov_drivers_autoprobe", "0" if request.count else "1")
            _write(pf, _NUM_VFS, str(request.count))
        now = _read(pf, _NUM_VFS)
        if (now != "0") != (request.count != 0):
            raise OperationError(ErrorCode.KERNEL, f"{pf.address} has {now} VFs, {request.count} were requested")
        return _outcome(request, before, now)


def _set_while_down(
    node: Node, request: Request, pf: PciDevice, name: str, text: str, stay_down: bool = False
) -> Outcome:
    before, state, end = _read(pf, name), _read(pf, _STATE), "down" if stay_down else "up"
    if _equal(before, text) and state == end:
        return _outcome(request, before, before)
    _check_vfs_unused(node, pf)
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
    _read_back(pf, _STATE, end)
    return _outcome(request, before, _read_back(pf, name, text))


def _outcome(request: Request, before: str, now: str) -> Outcome:
    return Outcome(Provisioned(id=request.id, audit=PENDING_HEAD, before=before, now=now))


def _equal(one: str, other: str) -> bool:
    """Whether two values are equal, regardless of the order of services."""
    return sorted(one.split(";")) == sorted(other.split(";"))


def _read_back(pf: PciDevice, name: str, text: str) -> str:
    """Read an attribute back after `text` was written. Raises OperationError if it differs."""
    now = _read(pf, name)
    if not _equal(now, text):
        raise OperationError(ErrorCode.KERNEL, f"{pf.address}: {name} shows {now!r} after {text!r} was written")
    return now


def _read(pf: PciDevice, name: str) -> str:
    text = pf.read_optional(name)
    if text is None:
        raise OperationError(ErrorCode.UNAVAILABLE, f"{pf.address} has no {name}: its driver or the kernel lacks it")
    return text[:60]


def _write(pf: PciDevice, name: str, text: str) -> None:
    write(pf, name, text, f"write {text!r} to {name}")


def _check_vfs_unused(node: Node, pf: PciDevice) -> None:
    """Check that the PF's VFs can be removed without blocking. Raises OperationError, SysfsError."""
    for _, address in pf.virtual_functions():
        if not isinstance(address, PciAddress):
            raise address
        try:
            with open_device(node.sysfs_root, address) as vf:
                kernel_driver, driver = node.policy.check_virtual(vf), vf.link("driver")
                deny_foreign(address, driver, kernel_driver)
                # Enabled without a driver: vfio-pci is being unbound and waits for the process that has it open.
                if driver in (DpdkDriver.VFIO_PCI, None) and vf.read("enable") != "0":
                    raise OperationError(
                        ErrorCode.BUSY,
                        f"{address}, a VF of {pf.address}, is in use: try again when its user has exited",
                    )
        except MissingError:
            continue  # removed in the meantime


@contextmanager
def _pf(node: Node, address: PciAddress) -> Iterator[PciDevice]:
    """Open a PF that may be provisioned and is bound to its own driver. Raises OperationError, SysfsError."""
    with open_device(node.sysfs_root, address) as device:
        driver = node.policy.check_physical(device)
        kind = PHYSICAL.get(device.read_int("device", 16))
        if kind is None or not kind.provisioned:
            raise denied("not-provisioned", f"{address} is a kind of PF that the helper does not provision")
        if device.link("driver") != driver:
            raise OperationError(ErrorCode.UNAVAILABLE, f"{address} is not bound to {driver}, its driver")
        yield device
