"""Every rule that a request must satisfy, and by default all of them. policy_file.py restricts them.

The serving loop checks the rules about the request itself. The operation checks the rules about the device, against the
device's own files, read at the time of use through its directory descriptor. Each denial names its rule.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from msgspec import Struct

from qat_helper.errors import denied
from qat_shared.devices import PHYSICAL, VIRTUAL, is_qat
from qat_shared.messages import DPDK_DRIVERS, DpdkDriver, SocketDirectory
from qat_shared.pci import PciAddress
from qat_shared.resources import RESOURCES
from qat_shared.sysfs import PciDevice

ALL: Final = "all"
"""The name of the rate limit that all audited operations of a uid share."""


class Rate(Struct, frozen=True):
    """A limit per uid: `burst` requests at once, then `per_second`."""

    burst: int
    per_second: float


BUILTIN_RATES: Final = MappingProxyType(
    {
        ALL: Rate(burst=2400, per_second=0.5),
        "RegisterResource": Rate(burst=256, per_second=0.1),
        "OpenPodResources": Rate(burst=128, per_second=2),
    }
)
"""16 PFs with 64 VFs each: their start takes 1,092 audited operations, a change of all services 1,091 more. Afterwards,
PodResources is queried once a minute and after allocations, and the audit log must not fill the disk. The kubelet keeps
one connection to the endpoint for each registration, for as long as the server does not close it."""

Id = tuple[int, int]
"""A PCI vendor and device id."""


class Policy(Struct, frozen=True):
    """Which uid may request what. `addresses` and `device_ids` None: every device of the device table.

    `max_vfs`: the most VFs that one PF may have (None: unlimited). `rates`: by operation, and `ALL`.
    """

    uids: frozenset[int]
    operations: frozenset[str]
    addresses: frozenset[PciAddress] | None = None
    drivers: frozenset[DpdkDriver] = frozenset(DpdkDriver)
    directories: frozenset[SocketDirectory] = frozenset(SocketDirectory)
    device_ids: frozenset[Id] | None = None
    max_vfs: int | None = None
    rates: Mapping[str, Rate] = BUILTIN_RATES

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

    def check_virtual(self, device: PciDevice) -> str:
        """The kernel VF driver of a VF that may be bound. Raises OperationError, SysfsError."""
        number = self._table_id(device)
        if number in VIRTUAL:
            return VIRTUAL[number].driver
        raise denied("virtual-functions-only", f"{device.address} is a PF: request one of its VFs")

    def check_physical(self, device: PciDevice) -> str:
        """The driver of a PF that may be read or provisioned. Raises OperationError, SysfsError."""
        number = self._table_id(device)
        if number in PHYSICAL:
            return PHYSICAL[number].driver
        raise denied("physical-functions-only", f"{device.address} is a VF: request its PF")

    def _table_id(self, device: PciDevice) -> int:
        """The device id, which is in the device table and allowed."""
        vendor, number = device.read_int("vendor", 16), device.read_int("device", 16)
        shown_id = f"{vendor:04x}:{number:04x}"
        if not is_qat(vendor, number):
            raise denied("device-table", f"{device.address} ({shown_id}) is not a QAT device")
        if self.device_ids is not None and (vendor, number) not in self.device_ids:
            raise denied("device_ids", f"{device.address} is of another kind: {_to_allow('device_ids', shown_id)}")
        return number


def _check_allowed(rule: str, value: object, allowed: frozenset[object] | None) -> None:
    """The check of every rule that is a list in the policy file; None allows all. Raises OperationError."""
    if allowed is not None and value not in allowed:
        raise denied(rule, f"the helper's policy does not allow {value}: {_to_allow(rule, value)}")


def _to_allow(rule: str, value: object) -> str:
    return f'to allow it, add the line {rule} = ["{value}"], or "{value}" to the line that is there'


def deny_foreign(address: PciAddress, driver: str | None, kernel_driver: str, how: str = "bound to") -> None:
    """A VF is taken only from its kernel VF driver or a DPDK driver: somebody chose any other.

    Raises OperationError.
    """
    if driver not in (None, kernel_driver, *DPDK_DRIVERS):
        raise denied("foreign-driver", f"{address} was {how} {driver} by somebody else: undo that if it was a mistake")
