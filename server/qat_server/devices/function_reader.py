"""Reads one PF or VF from its directory in sysfs, and checks its ids against the table of QAT devices.

An unreadable qat/ attribute or virtfn link of a PF becomes a Problem of that PF. Any other error means that the device
is not a usable QAT function, and is raised.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qat_server.devices.inventory import PhysicalFunction, Problem, VirtualFunction
from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress
from qat_shared.sysfs import MalformedError, MissingError, PciDevice, SysfsError, open_device

_NOIOMMU: Final = "vfio-noiommu"
_MAX_INT: Final = 2**31 - 1  # the kernel's numbers (NUMA nodes, groups) are ints; protobuf refuses larger ones
_DRIVER_NAME: Final = re.compile(r"[A-Za-z0-9_.+-]+", re.ASCII)
_UIO_NAME: Final = re.compile(r"uio[0-9]+", re.ASCII)
READ_ERRORS: Final = (SysfsError, OSError)
"""The errors that reading a device may raise."""


def read_pf(root: Path, address: PciAddress, driver: str, problems: list[Problem]) -> PhysicalFunction:
    """Read a PF that is bound to `driver`, and add its unreadable parts to `problems`. Raises SysfsError, OSError."""
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


def read_vf(root: Path, address: PciAddress, pf: PciAddress | None, vf_drivers: Sequence[str]) -> VirtualFunction:
    """Read a VF whose id belongs to one of the kernel VF drivers; it may be bound to any driver or to none.

    Raises SysfsError, OSError.
    """
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
            # Only vfio creates groups without an IOMMU, when it binds a device.
            noiommu=on_vfio and group is not None and device.read_optional("iommu_group/name") == _NOIOMMU,
            uio=_uio(device) if driver == DpdkDriver.IGB_UIO else None,
            in_use=read_in_use(device) if on_vfio else None,
        )


def read_in_use(device: PciDevice) -> bool:
    """Whether a process has opened a VF that is on vfio-pci. Raises SysfsError, OSError."""
    # vfio-pci enables a device when it is opened. Other drivers enable it when they bind, so it shows nothing there.
    return device.read("enable") != "0"


def error_text(error: SysfsError | OSError) -> str:
    """The reason, after the file's path where the error has one."""
    if isinstance(error, SysfsError):
        return f"{error.path}: {error.why}"
    return os.strerror(error.errno or 0)


def _qat_attribute(device: PciDevice, name: str, problems: list[Problem]) -> str | None:
    try:
        return device.read_optional(name)
    except SysfsError as error:
        problems.append(Problem(device.address, error_text(error)))
        return None


def _total_vfs(device: PciDevice) -> int:
    try:
        return _number(device, "sriov_totalvfs", device.read("sriov_totalvfs"))
    except MissingError:
        return 0  # a PF without SR-IOV, or with it turned off in the firmware


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
    if not (text.isascii() and text.isdecimal()) or int(text) > _MAX_INT:
        raise MalformedError(str(device.address), name, f"{text[:40]!r} is not a number")
    return int(text)
