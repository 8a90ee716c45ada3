"""The Inventory: an immutable snapshot of the QAT functions that discovery found.

Functions are always in address order.
"""

from msgspec import Struct

from qat_shared.pci import PciAddress


class PhysicalFunction(Struct, frozen=True):
    """One PF. `state` and `services` are qat/state and qat/cfg_services as read, None where the driver has none."""

    address: PciAddress
    device_id: int
    driver: str | None
    numa_node: int | None
    state: str | None
    services: str | None
    total_vfs: int
    vfs: tuple[PciAddress, ...]


class VirtualFunction(Struct, frozen=True):
    """One VF. `pf` is None inside a VM; `in_use` is whether the kernel reports that a process has the VF open.

    `in_use` is known (not None) only on vfio-pci. `uio` is the name under uio/ (uio3) when bound to igb_uio.
    """

    address: PciAddress
    device_id: int
    driver: str | None
    pf: PciAddress | None
    numa_node: int | None
    iommu_group: int | None
    noiommu: bool
    uio: str | None
    in_use: bool | None


class Problem(Struct, frozen=True):
    """The reason why discovery could not read, or does not use, one device (None: the bus)."""

    address: PciAddress | None
    text: str


class Inventory(Struct, frozen=True):
    """All selected QAT functions of the node. `cut` are the VFs over max-num-devices, which are not used."""

    pfs: tuple[PhysicalFunction, ...]
    vfs: tuple[VirtualFunction, ...]
    cut: tuple[PciAddress, ...]
    problems: tuple[Problem, ...]


def no_vfs_hint(pfs: int) -> str:
    """Advice for a node without VFs; `pfs` is the number of its PFs."""
    if pfs:
        return "enable them on a PF (--provisioning-config, or sriov_numvfs by hand)"
    return (
        "no PF either: load the PFs' kernel driver and name its VF driver in --kernel-vf-drivers; see qat-plugin doctor"
    )
