"""Every rule that a request must pass, and the root-owned file that may narrow them.

The rules about a request alone are checked in the serving loop; those about a device are checked by the operation,
against the device's own files, read at the time of use through its directory descriptor. Each denial names its rule.
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
from qat_shared.messages import DPDK_DRIVERS, DpdkDriver, KubeletService, SocketDirectory
from qat_shared.pci import PciAddress
from qat_shared.sysfs import PciDevice

FILE_LIMIT: Final = 64 * 1024
ALL: Final = "all"
"""The rate limit that all audited operations of a uid have in common."""


class PolicyError(Exception):
    """The policy file cannot be used: one sentence."""


class Rate(Struct, frozen=True, forbid_unknown_fields=True):
    """A limit for each uid: so many requests at once, and so many a second after that."""

    burst: Annotated[int, Meta(ge=1, le=1_000_000)]
    per_second: Annotated[float, Meta(gt=0, le=1_000_000)]


BUILTIN_RATES: Final = MappingProxyType({ALL: Rate(burst=2048, per_second=10)})
"""A node's VFs are bound all at once at the start; after that the audit log must not fill the disk."""

Id = tuple[int, int]
"""A PCI vendor and device id."""


class Policy(Struct, frozen=True):
    """Who may ask for what. `addresses`, `device_ids` None: all, as long as the device is in the device table.

    `max_vfs`: the most VFs that one PF may be given (None: any number). `rates` by operation, and `ALL`. The extra ids
    may be used beyond the table: for tests.
    """

    uids: frozenset[int]
    operations: frozenset[str]
    addresses: frozenset[PciAddress] | None = None
    drivers: frozenset[DpdkDriver] = frozenset(DpdkDriver)
    directories: frozenset[SocketDirectory] = frozenset(SocketDirectory)
    services: frozenset[KubeletService] = frozenset(KubeletService)
    device_ids: frozenset[Id] | None = None
    max_vfs: int | None = None
    rates: Mapping[str, Rate] = BUILTIN_RATES
    extra_virtual_ids: frozenset[Id] = frozenset()
    extra_physical_ids: frozenset[Id] = frozenset()

    def check_operation(self, name: str) -> None:
        """Raises OperationError."""
        _check_among("operations", name, self.operations)

    def check_address(self, address: PciAddress) -> None:
        """Raises OperationError."""
        _check_among("addresses", address, self.addresses)

    def check_driver(self, driver: DpdkDriver) -> None:
        """Raises OperationError."""
        _check_among("drivers", driver, self.drivers)

    def check_directory(self, directory: SocketDirectory) -> None:
        """Raises OperationError."""
        _check_among("directories", directory, self.directories)

    def check_service(self, service: KubeletService) -> None:
        """Raises OperationError."""
        _check_among("kubelet_services", service, self.services)

    def check_vf_count(self, address: PciAddress, count: int) -> None:
        """`count`: the VFs that the PF would have then, whatever number was asked for. Raises OperationError."""
        if self.max_vfs is not None and count > self.max_vfs:
            raise denied(
                "max_vfs", f"{address} would have {count} VFs, the helper's policy file allows {self.max_vfs} (max_vfs)"
            )

    def check_virtual(self, device: PciDevice) -> str | None:
        """The kernel VF driver of a VF that may be bound (None: it has none). Raises OperationError, SysfsError."""
        number = self._known_id(device, self.extra_virtual_ids)
        if number is None:
            return None
        if number in VIRTUAL:
            return VIRTUAL[number].driver
        raise denied("virtual-functions-only", f"{device.address} is a PF: ask for one of its VFs")

    def check_physical(self, device: PciDevice) -> str:
        """The driver of a PF that may be read or provisioned ("": an extra one). Raises OperationError, SysfsError."""
        number = self._known_id(device, self.extra_physical_ids)
        if number is None:
            return ""
        if number in PHYSICAL:
            return PHYSICAL[number].driver
        raise denied("physical-functions-only", f"{device.address} is a VF: ask for its PF")

    def _known_id(self, device: PciDevice, extra: frozenset[Id]) -> int | None:
        """Its device id in the device table, None if it is one of `extra`."""
        vendor, number = device.read_int("vendor", 16), device.read_int("device", 16)
        if (vendor, number) in extra:
            return None
        shown = f"{device.address} ({vendor:04x}:{number:04x})"
        if not is_qat(vendor, number):
            raise denied("device-table", f"{shown} is not a QAT device and is never touched")
        if self.device_ids is not None and (vendor, number) not in self.device_ids:
            raise denied("device_ids", f"{shown} is not among the device_ids of the helper's policy file")
        return number


def _check_among(rule: str, what: object, allowed: frozenset[object] | None) -> None:
    """Every rule that is a list in the policy file; None: all are allowed. Raises OperationError."""
    if allowed is not None and what not in allowed:
        raise denied(rule, f"{what} is not among the {rule} of the helper's policy file")


def is_qat(vendor: int, number: int) -> bool:
    """Whether it is in the device table."""
    return vendor == VENDOR_INTEL and (number in VIRTUAL or number in PHYSICAL)


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
    device_ids: frozenset[str] | None = None
    drivers: frozenset[DpdkDriver] | None = None
    directories: frozenset[SocketDirectory] | None = None
    kubelet_services: frozenset[KubeletService] | None = None
    max_vfs: Annotated[int, Meta(ge=0)] | None = None
    rates: dict[str, Rate] = {}
    extra_virtual_ids: tuple[str, ...] = ()
    extra_physical_ids: tuple[str, ...] = ()


def narrow(builtin: Policy, path: Path, owner: int) -> Policy:
    """The built-in policy as the TOML file at `path` narrows it. `owner`: the uid that the file must have.

    Raises PolicyError.
    """
    import tomllib  # noqa: PLC0415  most helpers have no policy file, and memory counts

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
            services=builtin.services if file.kubelet_services is None else file.kubelet_services,
            max_vfs=file.max_vfs,
            rates={**builtin.rates, **file.rates},
            extra_virtual_ids=_ids("extra_virtual_ids", file.extra_virtual_ids, qat=False),
            extra_physical_ids=_ids("extra_physical_ids", file.extra_physical_ids, qat=False),
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
        # Where links lead (a ConfigMap's are links). Who can write there could put another file of root's in its place.
        folder = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent
        for what, who in ((f"the policy file {path}", status), (f"{folder}, where {path} is,", os.stat(folder))):
            if who.st_uid not in (0, owner):
                raise PolicyError(f"{what} belongs to uid {who.st_uid}: make it root's")
            if who.st_mode & 0o022:
                raise PolicyError(f"{what} can be written by others: chmod go-w, or put it elsewhere")
        text = os.read(descriptor, FILE_LIMIT + 1)
    finally:
        os.close(descriptor)
    if len(text) > FILE_LIMIT:
        raise PolicyError(f"the policy file {path} is longer than {FILE_LIMIT} bytes")
    return text.decode()


def _check_names(key: str, names: Iterable[str], known: frozenset[str]) -> None:
    if unknown := frozenset(names) - known:
        raise ValueError(f"{', '.join(sorted(unknown))} is no operation - at `$.{key}`")


def _address(text: str) -> PciAddress:
    try:
        return PciAddress.parse(text)
    except ValueError as error:
        raise ValueError(f"{error} - at `$.addresses`") from None


def _ids(key: str, texts: Iterable[str], *, qat: bool) -> frozenset[Id]:
    """Ids that are all of QAT devices, or none is: the table knows what those may be used for."""
    found = set()
    for text in texts:
        vendor, colon, device = text.partition(":")
        if not (colon and len(vendor) == len(device) == 4 and set(vendor + device) <= set("0123456789abcdef")):
            raise ValueError(f"{text[:40]!r} is no id such as 8086:4941 - at `$.{key}`")
        pair = (int(vendor, 16), int(device, 16))
        if is_qat(*pair) is not qat:
            raise ValueError(f"{text} is {'no' if qat else 'a'} QAT device - at `$.{key}`")
        found.add(pair)
    return frozenset(found)
