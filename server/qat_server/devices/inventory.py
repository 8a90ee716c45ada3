"""What discovery found and what the kubelet is told: immutable snapshots, passed from stage to stage.

Nobody changes one; each stage makes a new one. The order of functions and devices is always the order of addresses.
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
    """One VF. `pf` is None inside a VM; `in_use` is the kernel's word on whether a process holds it open.

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
    """Something that discovery could not read or will not touch: one sentence about one device (None: the bus)."""

    address: PciAddress | None
    text: str


class Inventory(Struct, frozen=True):
    """All selected QAT functions of the node. `cut` are the VFs beyond max-num-devices, which are left alone."""

    pfs: tuple[PhysicalFunction, ...]
    vfs: tuple[VirtualFunction, ...]
    cut: tuple[PciAddress, ...]
    problems: tuple[Problem, ...]


def no_vfs_hint(pfs: int) -> str:
    """What to do on a node without VFs that has so many PFs."""
    if pfs:
        return "enable them on a PF (--provisioning-config, or sriov_numvfs by hand)"
    return (
        "no PF either: load the PFs' kernel driver, name its VFs' in --kernel-vf-drivers; qat-plugin doctor says more"
    )
