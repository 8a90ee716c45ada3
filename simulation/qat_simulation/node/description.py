"""The description of a simulated node: its PCI functions as they are when the node starts, loaded drivers, the IOMMU.

It is read from JSON (`--node FILE`) or made in code, checked here, and trusted everywhere else.

    {"pfs": [{"address": "0000:6b:00.0", "device": "4940", "numa_node": 0, "services": "sym;asym", "total_vfs": 8}]}
"""

from collections.abc import Iterator
from typing import Annotated, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_shared.messages import DPDK_DRIVERS
from qat_shared.pci import PciAddress
from qat_simulation.node.services import services_allowed, services_rule

GEN4: Final = frozenset({0x4940, 0x4942, 0x4944, 0x4946, 0x4948})
"""PFs whose driver has the qat/ attributes. Older PFs show their configuration only in debugfs."""

DENYLISTED: Final = frozenset({"dh895xcc", "dh895xccvf", "c3xxx", "c3xxxvf", "c6xx", "c6xxvf"})
"""Kernel drivers of the devices that vfio-pci refuses (vfio_pci.c, vfio_pci_dev_in_denylist, since Linux 5.9)."""

HexId = Annotated[str, Meta(pattern=r"^(0x)?[0-9a-fA-F]{4}$", description="a PCI id in hexadecimal: 4940")]
NumaNode = Annotated[int, Meta(ge=0, le=1023)]
DriverName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
OptionalDriver = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{0,40}$")]


class NodeError(ValueError):
    """An invalid node description: one sentence that names the device and the key."""


class Pf(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A PF, and its VFs as they are when the node starts.

    `driver` and `vf_driver` are the bound drivers; by default the kernel's own choice, "" for none. `num_vfs` is the
    number of enabled VFs (default: total_vfs, or 0 if the device is down; the QAT driver supports only these two).
    `services` is the value of qat/cfg_services; on a device without qat/ it is in dev_cfg in debugfs.
    `pm_idle_enabled` None: the driver is older than that attribute (kernel 6.5).
    `vf_offset` and `vf_stride` are fields of the SR-IOV capability; they determine the VFs' addresses.
    """

    address: str
    device: HexId = "4940"
    driver: OptionalDriver | None = None
    numa_node: NumaNode | None = None
    state: Literal["up", "down"] = "up"
    services: Annotated[str, Meta(max_length=60)] | None = None
    auto_reset: bool = False
    pm_idle_enabled: bool | None = True
    heartbeat: Literal[0, -1] = 0
    total_vfs: Annotated[int, Meta(ge=0, le=256)] = 16
    num_vfs: Annotated[int, Meta(ge=0, le=256)] | None = None
    vf_driver: OptionalDriver | None = None
    vf_offset: Annotated[int, Meta(ge=1, le=0xFFFF)] | None = None
    vf_stride: Annotated[int, Meta(ge=1, le=0xFFFF)] = 1
    dev_cfg: Annotated[str, Meta(max_length=32768)] | None = None

    @property
    def pci_address(self) -> PciAddress:
        """The address, parsed."""
        return PciAddress.parse(self.address)

    @property
    def device_id(self) -> int:
        """The PCI device id as a number."""
        return int(self.device, 16)

    @property
    def vf_device_id(self) -> int:
        """The PCI device id of its VFs."""
        return max(number for number, kind in VIRTUAL.items() if kind.physical == self.device_id)  # 0443, not 0442

    @property
    def has_qat_attributes(self) -> bool:
        """Whether its driver adds a qat/ directory (Gen4 and later)."""
        return self.device_id in GEN4

    @property
    def enabled_vfs(self) -> int:
        """The number of VFs at the start."""
        if self.num_vfs is not None:
            return self.num_vfs
        return self.total_vfs if self.state == "up" and self.bound_to == self.kernel_driver else 0

    @property
    def kernel_driver(self) -> str:
        """The kernel's own driver for it."""
        return PHYSICAL[self.device_id].driver

    @property
    def bound_to(self) -> str:
        """The bound driver at the start, "" for none."""
        return self.kernel_driver if self.driver is None else self.driver

    def vf_address(self, number: int) -> PciAddress:
        """The address of VF `number` (from 0) by the SR-IOV capability. Raises ValueError beyond the last bus."""
        # Gen4 and later: 00.1, 00.2, ...; older devices: from 01.0 on.
        offset = self.vf_offset or (1 if self.has_qat_attributes else 8)
        pf = self.pci_address
        routing_id = (pf.bus << 8 | pf.device << 3 | pf.function) + offset + number * self.vf_stride
        if routing_id > 0xFFFF:
            raise ValueError("beyond the last bus")
        return PciAddress(pf.domain, routing_id >> 8, routing_id >> 3 & 0x1F, routing_id & 7)


class LoneVf(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VF without its PF, as in a virtual machine that it was passed to."""

    address: str
    device: HexId = "4941"
    driver: OptionalDriver | None = None
    numa_node: NumaNode | None = None


class OtherDevice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Any other PCI function; the plugin ignores it."""

    address: str
    vendor: HexId
    device: HexId
    class_code: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{6}$")] = "020000"
    driver: OptionalDriver = ""
    numa_node: NumaNode | None = None


class Node(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole node. `drivers` are loaded in addition to the QAT drivers in `kernel_drivers` (None: all needed).

    `disable_denylist` is vfio-pci's parameter: without it, vfio-pci rejects VFs of dh895xcc, c3xxx and c6xx.
    `noiommu` is vfio's enable_unsafe_noiommu_mode. `canonical_services`: whether cfg_services is shown in the
    kernel's order (asym;sym) after a write, as since Linux 6.16, or as it was written.
    """

    pfs: tuple[Pf, ...] = ()
    vfs: tuple[LoneVf, ...] = ()
    others: tuple[OtherDevice, ...] = ()
    iommu: bool = True
    noiommu: bool = False
    disable_denylist: bool = True
    drivers: tuple[DriverName, ...] = ("vfio-pci", "igb_uio")
    kernel_drivers: tuple[DriverName, ...] | None = None
    canonical_services: bool = True

    def __post_init__(self) -> None:
        check(self)

    @property
    def loaded_kernel_drivers(self) -> tuple[str, ...]:
        """The QAT drivers loaded at the start, in the order in which a new device is offered to them."""
        if self.kernel_drivers is not None:
            return self.kernel_drivers
        needed = {PHYSICAL[pf.device_id].driver for pf in self.pfs}
        needed |= {VIRTUAL[pf.vf_device_id].driver for pf in self.pfs}
        needed |= {VIRTUAL[int(vf.device, 16)].driver for vf in self.vfs}
        return tuple(sorted(needed))


def parse_node(text: bytes | str) -> Node:
    """Read a description from JSON. Raises NodeError."""
    try:
        return msgspec.json.decode(text, type=Node)
    except msgspec.ValidationError as error:
        raise NodeError(f"the node description is not usable: {_with_choices(str(error))}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise NodeError(f"the node description is not usable: it is not JSON: {error}") from None


def _with_choices(sentence: str) -> str:
    """Add the allowed values of a key to msgspec's sentence, which does not list them."""
    key = sentence.rstrip("`").rpartition(".")[2]
    hint = get_type_hints(Pf).get(key)
    if not sentence.startswith("Invalid enum value") or get_origin(hint) is not Literal:
        return sentence
    return f"{sentence}: it is {' or '.join(map(str, get_args(hint)))}"


def check(node: Node) -> None:
    """Raise NodeError for errors that the types do not exclude: unknown devices, repeated addresses, impossible VFs."""
    seen: dict[PciAddress, str] = {}
    for address, name in _addresses(node):
        if address in seen:
            raise NodeError(f"{name}: address {address} is taken by {seen[address]}")
        seen[address] = name
    for pf in node.pfs:
        _check_pf(pf, node)


def _check_pf(pf: Pf, node: Node) -> None:
    name = f"PF {pf.address}"
    if pf.enabled_vfs > pf.total_vfs:
        raise NodeError(f"{name}: num_vfs: {pf.num_vfs} is more than total_vfs, {pf.total_vfs}")
    if pf.enabled_vfs and pf.state == "down":
        raise NodeError(f"{name}: num_vfs: a device that is down has no VFs")
    if pf.state == "down" and not pf.has_qat_attributes:
        raise NodeError(f"{name}: state: only devices with qat/ attributes can be down, {pf.device} has none")
    if pf.services is not None and pf.has_qat_attributes and not services_allowed(pf.device_id, pf.services):
        rule = services_rule(pf.device_id)
        raise NodeError(f"{name}: services: {pf.device} does not accept {pf.services!r}: {rule}")
    _check_vf_driver(name, "vf_driver", pf.vf_driver, VIRTUAL[pf.vf_device_id].driver, node)


def _check_vf_driver(name: str, key: str, driver: str | None, own: str, node: Node) -> None:
    if not driver:
        return
    known = dict.fromkeys((own, *DPDK_DRIVERS, *node.drivers))
    if driver not in known:
        raise NodeError(f"{name}: {key}: {driver!r} is none of {', '.join(known)}; list other drivers in drivers")
    if driver == "vfio-pci" and own in DENYLISTED and not node.disable_denylist:
        raise NodeError(f"{name}: {key}: {driver} rejects {own}'s devices; set disable_denylist")
    if driver == "vfio-pci" and not (node.iommu or node.noiommu):
        raise NodeError(f"{name}: {key}: {driver} rejects all devices on a node without IOMMU; set noiommu")


def _addresses(node: Node) -> Iterator[tuple[PciAddress, str]]:
    for pf in node.pfs:
        name = f"PF {pf.address}"
        if pf.device_id not in PHYSICAL:
            raise NodeError(f"{name}: device: {pf.device} is not the id of a QAT PF")
        yield _address(pf.address, name), name
        for number in range(pf.total_vfs):
            try:
                address = pf.vf_address(number)
            except ValueError:
                raise NodeError(f"{name}: total_vfs: VF {number} would be beyond bus ff") from None
            yield address, f"VF {number} of {name}"
    for vf in node.vfs:
        name = f"VF {vf.address}"
        if int(vf.device, 16) not in VIRTUAL:
            raise NodeError(f"{name}: device: {vf.device} is not the id of a QAT VF")
        _check_vf_driver(name, "driver", vf.driver, VIRTUAL[int(vf.device, 16)].driver, node)
        yield _address(vf.address, name), name
    for other in node.others:
        name = f"device {other.address}"
        ids = PHYSICAL.keys() | VIRTUAL.keys()
        if int(other.vendor, 16) == VENDOR_INTEL and int(other.device, 16) in ids:
            raise NodeError(f"{name}: device: {other.device} is a QAT id; it belongs under pfs or vfs")
        yield _address(other.address, name), name


def _address(text: str, name: str) -> PciAddress:
    try:
        return PciAddress.parse(text)
    except ValueError as error:
        raise NodeError(f"{name}: address: {error}") from None


def demo_node() -> Node:
    """Three Gen4 devices, two for crypto, one for compression and without VFs; an older one in another domain."""
    return Node(
        pfs=(
            Pf(address="0000:6b:00.0", device="4940", numa_node=0, services="sym;asym", total_vfs=8),
            Pf(address="0000:70:00.0", device="4940", numa_node=0, services="sym;asym", total_vfs=8),
            Pf(address="0000:e8:00.0", device="4940", numa_node=1, services="dc", total_vfs=8, num_vfs=0),
            Pf(address="0001:3d:00.0", device="37c8", numa_node=1, total_vfs=4),
        )
    )
