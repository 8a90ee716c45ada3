"""Every rule that a request must pass, and the root-owned file that may narrow them.

The rules about a request alone are checked in the serving loop; those about a device are checked by the operation,
against the device's own files, read at the time of use through its directory descriptor. Each denial names its rule.
"""

import os
import stat
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from qat_helper.errors import denied
from qat_shared.devices import DPDK_DRIVERS, PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_shared.messages import DpdkDriver, SocketDirectory
from qat_shared.pci import PciAddress
from qat_shared.sysfs import PciDevice

FILE_LIMIT: Final = 64 * 1024


class PolicyError(Exception):
    """The policy file cannot be used: one sentence."""


class Policy(Struct, frozen=True):
    """Who may ask for what. `addresses` None: every address, as long as the device is in the device table.

    `extra_virtual_ids` are (vendor, device) pairs that may be bound and released beyond the table: for tests.
    """

    uids: frozenset[int]
    operations: frozenset[str]
    addresses: frozenset[PciAddress] | None = None
    drivers: frozenset[DpdkDriver] = frozenset(DpdkDriver)
    directories: frozenset[SocketDirectory] = frozenset(SocketDirectory)
    extra_virtual_ids: frozenset[tuple[int, int]] = frozenset()

    def check_operation(self, name: str) -> None:
        """Raises OperationError."""
        if name not in self.operations:
            raise denied("operations", f"{name} is not among the operations of the helper's policy file")

    def check_address(self, address: PciAddress) -> None:
        """Raises OperationError."""
        if self.addresses is not None and address not in self.addresses:
            raise denied("addresses", f"{address} is not among the addresses of the helper's policy file")

    def check_driver(self, driver: DpdkDriver) -> None:
        """Raises OperationError."""
        if driver not in self.drivers:
            raise denied("drivers", f"{driver} is not among the drivers of the helper's policy file")

    def check_directory(self, directory: SocketDirectory) -> None:
        """Raises OperationError."""
        if directory not in self.directories:
            raise denied("directories", f"{directory} is not among the directories of the helper's policy file")

    def check_virtual(self, device: PciDevice) -> str | None:
        """The kernel VF driver of a VF that may be bound (None: it has none). Raises OperationError, SysfsError."""
        vendor, number = device.read_int("vendor", 16), device.read_int("device", 16)
        if (vendor, number) in self.extra_virtual_ids:
            return None
        if vendor == VENDOR_INTEL and number in VIRTUAL:
            return VIRTUAL[number].driver
        if vendor == VENDOR_INTEL and number in PHYSICAL:
            raise denied("virtual-functions-only", f"{device.address} is a PF: ask for one of its VFs")
        raise denied(
            "device-table", f"{device.address} ({vendor:04x}:{number:04x}) is not a QAT device and is never touched"
        )

    def check_physical(self, device: PciDevice) -> str:
        """The PF driver of a PF that may be read. Raises OperationError, SysfsError."""
        vendor, number = device.read_int("vendor", 16), device.read_int("device", 16)
        if vendor == VENDOR_INTEL and number in PHYSICAL:
            return PHYSICAL[number].driver
        if vendor == VENDOR_INTEL and number in VIRTUAL:
            raise denied("physical-functions-only", f"{device.address} is a VF: ask for its PF")
        raise denied(
            "device-table", f"{device.address} ({vendor:04x}:{number:04x}) is not a QAT device and is never read"
        )


def check_own_driver(address: PciAddress, driver: str | None, kernel_driver: str | None, how: str = "bound to") -> None:
    """A VF is taken only from its kernel VF driver or a DPDK driver: any other was somebody's decision."""
    if driver not in (None, kernel_driver, *DPDK_DRIVERS):
        raise denied(
            "foreign-driver", f"{address} was {how} {driver} by somebody else: undo it there, if that was a mistake"
        )


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    """The file's keys. What is absent is not narrowed."""

    server_uids: frozenset[int] = frozenset()
    operations: frozenset[str] | None = None
    addresses: frozenset[str] | None = None
    drivers: frozenset[DpdkDriver] | None = None
    directories: frozenset[SocketDirectory] | None = None
    extra_virtual_ids: tuple[str, ...] = ()


def narrow(builtin: Policy, path: Path, owner: int) -> Policy:
    """The built-in policy as the TOML file at `path` narrows it. `owner`: the uid that the file must have.

    Raises PolicyError.
    """
    import tomllib  # noqa: PLC0415  most helpers have no policy file, and memory counts

    try:
        file = msgspec.convert(tomllib.loads(_read(path, owner)), _File)
        if unknown := (file.operations or frozenset()) - builtin.operations:
            raise ValueError(f"{', '.join(sorted(unknown))} is no operation - at `$.operations`")
        return Policy(
            uids=builtin.uids | file.server_uids,
            operations=builtin.operations if file.operations is None else file.operations,
            addresses=None if file.addresses is None else frozenset(map(_address, file.addresses)),
            drivers=builtin.drivers if file.drivers is None else file.drivers,
            directories=builtin.directories if file.directories is None else file.directories,
            extra_virtual_ids=frozenset(map(_virtual_id, file.extra_virtual_ids)),
        )
    except OSError as error:
        raise PolicyError(f"the policy file {path} cannot be read: {os.strerror(error.errno or 0)}") from error
    except (ValueError, RecursionError) as error:  # tomllib, msgspec and UTF-8 errors are all ValueErrors
        raise PolicyError(f"the policy file {path} is not usable: {error}") from error


def _read(path: Path, owner: int) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PolicyError(f"the policy file {path} is not a plain file")
        if status.st_uid not in (0, owner):
            raise PolicyError(f"the policy file {path} belongs to uid {status.st_uid}: make it root's")
        if status.st_mode & 0o022:
            raise PolicyError(f"the policy file {path} can be written by others: make its mode 0644 or stricter")
        text = os.read(descriptor, FILE_LIMIT + 1)
    finally:
        os.close(descriptor)
    if len(text) > FILE_LIMIT:
        raise PolicyError(f"the policy file {path} is longer than {FILE_LIMIT} bytes")
    return text.decode()


def _address(text: str) -> PciAddress:
    try:
        return PciAddress.parse(text)
    except ValueError as error:
        raise ValueError(f"{error} - at `$.addresses`") from None


def _virtual_id(text: str) -> tuple[int, int]:
    vendor, colon, device = text.partition(":")
    if not (colon and len(vendor) == len(device) == 4 and set(vendor + device) <= set("0123456789abcdef")):
        raise ValueError(f"{text[:40]!r} is no id such as 8086:4941 - at `$.extra_virtual_ids`")
    pair = (int(vendor, 16), int(device, 16))
    if pair[0] == VENDOR_INTEL and pair[1] in PHYSICAL:
        raise ValueError(f"{text} is a QAT PF, and a PF is never bound - at `$.extra_virtual_ids`")
    return pair
