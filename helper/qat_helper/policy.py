"""Every rule that a request must satisfy, and the root-owned file that can restrict them.

The serving loop checks the rules about the request itself. The operation checks the rules about the device, against the
device's own files, read at the time of use through its directory descriptor. Each denial names its rule.
"""

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from qat_helper.errors import denied
from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_shared.messages import DPDK_DRIVERS, DpdkDriver, SocketDirectory
from qat_shared.pci import PciAddress
from qat_shared.resources import RESOURCES
from qat_shared.sysfs import PciDevice

FILE_LIMIT: Final = 64 * 1024
ALL: Final = "all"
"""The name of the rate limit that all audited operations of a uid share."""


class PolicyError(Exception):
    """The policy file cannot be used. The message is one sentence."""


class Rate(Struct, frozen=True, forbid_unknown_fields=True):
    """A limit per uid: `burst` requests at once, then `per_second`."""

    burst: Annotated[int, Meta(ge=1, le=1_000_000)]
    per_second: Annotated[float, Meta(gt=0, le=1_000_000)]


BUILTIN_RATES: Final = MappingProxyType(
    {
        ALL: Rate(burst=2048, per_second=10),
        "RegisterResource": Rate(burst=256, per_second=0.1),
        "OpenPodResources": Rate(burst=128, per_second=2),
    }
)
"""All VFs of a node are bound at once at start-up; after that, the audit log must not fill the disk. The kubelet keeps
one connection to the endpoint for each registration, for as long as the server does not close it."""

Id = tuple[int, int]
"""A PCI vendor and device id."""


class Policy(Struct, frozen=True):
    """Which uid may request what. `addresses` and `device_ids` None: every device of the device table.

    `max_vfs`: the most VFs that one PF may have (None: unlimited). `rates`: by operation, and `ALL`. The extra ids are
    allowed in addition to the table: for tests.
    """

    uids: frozenset[int]
    operations: frozenset[str]
    addresses: frozenset[PciAddress] | None = None
    drivers: frozenset[DpdkDriver] = frozenset(DpdkDriver)
    directories: frozenset[SocketDirectory] = frozenset(SocketDirectory)
    device_ids: frozenset[Id] | None = None
    max_vfs: int | None = None
    rates: Mapping[str, Rate] = BUILTIN_RATES
    extra_virtual_ids: frozenset[Id] = frozenset()
    extra_physical_ids: frozenset[Id] = frozenset()

    def check_operation(self, name: str) -> None:
        """Raises OperationError."""
        _check_allowed("operations", name, self.operations)

    def check_address(self, address: PciAddress) -> None:
        """Raises OperationError."""
        _check_allowed("addresses", address, self.addresses)

    def check_driver(self, driver: DpdkDriver) -> None:
        """Raises OperationError."""
        _check_allowed("drivers", driver, self.drivers)

    def check_directory(self, directory: SocketDirectory) -> None:
        """Raises OperationError."""
        _check_allowed("directories", directory, self.directories)

    def check_resource(self, name: str) -> None:
        """Raises OperationError."""
        if name not in RESOURCES:
            raise denied("resource-name", f"{name} is not a resource of QAT devices")

    def check_vf_count(self, address: PciAddress, count: int) -> None:
        """`count`: the VFs that the PF would then have, whatever number was requested. Raises OperationError."""
        if self.max_vfs is not None and count > self.max_vfs:
            raise denied(
                "max_vfs", f"{address} would have {count} VFs; the helper's policy file allows {self.max_vfs} (max_vfs)"
            )

    def check_virtual(self, device: PciDevice) -> str | None:
        """The kernel VF driver of a VF that may be bound (None: an extra id). Raises OperationError, SysfsError."""
        number = self._table_id(device, self.extra_virtual_ids)
        if number is None:
            return None
        if number in VIRTUAL:
            return VIRTUAL[number].driver
        raise denied("virtual-functions-only", f"{device.address} is a PF: request one of its VFs")

    def check_physical(self, device: PciDevice) -> str:
        """The driver of a PF that may be read or provisioned ("": an extra id). Raises OperationError, SysfsError."""
        number = self._table_id(device, self.extra_physical_ids)
        if number is None:
            return ""
        if number in PHYSICAL:
            return PHYSICAL[number].driver
        raise denied("physical-functions-only", f"{device.address} is a VF: request its PF")

    def _table_id(self, device: PciDevice, extra: frozenset[Id]) -> int | None:
        """The device id if it is in the device table, None if it is one of `extra`."""
        vendor, number = device.read_int("vendor", 16), device.read_int("device", 16)
        if (vendor, number) in extra:
            return None
        shown = f"{device.address} ({vendor:04x}:{number:04x})"
        if not is_qat(vendor, number):
            raise denied("device-table", f"{shown} is not a QAT device")
        if self.device_ids is not None and (vendor, number) not in self.device_ids:
            raise denied("device_ids", f"{shown} is not among the device_ids of the helper's policy file")
        return number


def _check_allowed(rule: str, value: object, allowed: frozenset[object] | None) -> None:
    """The check of every rule that is a list in the policy file; None allows all. Raises OperationError."""
    if allowed is not None and value not in allowed:
        raise denied(rule, f"{value} is not among the {rule} of the helper's policy file")


def is_qat(vendor: int, number: int) -> bool:
    """Whether the PCI id is in the device table."""
    return vendor == VENDOR_INTEL and (number in VIRTUAL or number in PHYSICAL)


def deny_foreign(address: PciAddress, driver: str | None, kernel_driver: str | None, how: str = "bound to") -> None:
    """A VF is taken only from its kernel VF driver or a DPDK driver: somebody chose any other.

    Raises OperationError.
    """
    if driver not in (None, kernel_driver, *DPDK_DRIVERS):
        raise denied("foreign-driver", f"{address} was {how} {driver} by somebody else: undo that if it was a mistake")


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    """The file's keys. An absent key restricts nothing."""

    server_uids: frozenset[int] = frozenset()
    operations: frozenset[str] | None = None
    addresses: frozenset[str] | None = None
    device_ids: frozenset[str] | None = None
    drivers: frozenset[DpdkDriver] | None = None
    directories: frozenset[SocketDirectory] | None = None
    max_vfs: Annotated[int, Meta(ge=0)] | None = None
    rates: dict[str, Rate] = {}
    extra_virtual_ids: tuple[str, ...] = ()
    extra_physical_ids: tuple[str, ...] = ()


def narrow(builtin: Policy, path: Path, owner: int) -> Policy:
    """The built-in policy, restricted by the TOML file at `path`. `owner`: the uid, other than root, that may own it.

    Raises PolicyError.
    """
    import tomllib  # noqa: PLC0415  most helpers have no policy file, and the module takes memory

    try:
        file = msgspec.convert(tomllib.loads(_read(path, owner)), _File)
        _check_names("operations", file.operations or (), builtin.operations)
        _check_names("rates", file.rates, builtin.operations | {ALL})
        return Policy(
            uids=builtin.uids | file.server_uids,
            operations=builtin.operations if file.operations is None else file.operations,
            addresses=None if file.addresses is None else frozenset(map(_address, file.addresses)),
            device_ids=None if file.device_ids is None else _ids("device_ids", file.device_ids, qat=True),
            drivers=builtin.drivers if file.drivers is None else file.drivers,
            directories=builtin.directories if file.directories is None else file.directories,
            max_vfs=file.max_vfs,
            rates={**builtin.rates, **file.rates},
            extra_virtual_ids=_ids("extra_virtual_ids", file.extra_virtual_ids, qat=False),
            extra_physical_ids=_ids("extra_physical_ids", file.extra_physical_ids, qat=False),
        )
    except OSError as error:
        raise PolicyError(f"the policy file {path} cannot be read: {os.strerror(error.errno or 0)}") from error
    except (ValueError, RecursionError) as error:  # errors of tomllib, msgspec and UTF-8 decoding are all ValueErrors
        raise PolicyError(f"the policy file {path} is not usable: {error}") from error


def _read(path: Path, owner: int) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PolicyError(f"the policy file {path} is not a regular file")
        # The directory after resolving links, which a ConfigMap's files are. Anybody who can write there could
        # substitute another root-owned file.
        folder = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent
        for what, info in ((f"the policy file {path}", status), (f"{folder}, where {path} is,", os.stat(folder))):
            if info.st_uid not in (0, owner):
                raise PolicyError(f"{what} belongs to uid {info.st_uid}: change the owner to root")
            if info.st_mode & 0o022:
                raise PolicyError(f"{what} can be written by others: run chmod go-w, or use another directory")
        text = os.read(descriptor, FILE_LIMIT + 1)
    finally:
        os.close(descriptor)
    if len(text) > FILE_LIMIT:
        raise PolicyError(f"the policy file {path} is longer than {FILE_LIMIT} bytes")
    return text.decode()


def _check_names(key: str, names: Iterable[str], known: frozenset[str]) -> None:
    if unknown := frozenset(names) - known:
        raise ValueError(f"{', '.join(sorted(unknown))} is not an operation - at `$.{key}`")


def _address(text: str) -> PciAddress:
    try:
        return PciAddress.parse(text)
    except ValueError as error:
        raise ValueError(f"{error} - at `$.addresses`") from None


def _ids(key: str, texts: Iterable[str], *, qat: bool) -> frozenset[Id]:
    """Parse PCI ids. All must be QAT devices, or none may be: the table defines what QAT devices are used for."""
    found = set()
    for text in texts:
        vendor, colon, device = text.partition(":")
        if not (colon and len(vendor) == len(device) == 4 and set(vendor + device) <= set("0123456789abcdef")):
            raise ValueError(f"{text[:40]!r} is not an id such as 8086:4941 - at `$.{key}`")
        pair = (int(vendor, 16), int(device, 16))
        if is_qat(*pair) is not qat:
            raise ValueError(f"{text} is {'not ' if qat else ''}a QAT device - at `$.{key}`")
        found.add(pair)
    return frozenset(found)
