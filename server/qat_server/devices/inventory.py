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


class Device(Struct, frozen=True):
    """One VF as the kubelet is told of it. `nodes` are device files (rw), `mounts` host paths, the same inside.

    `reason` says why it is not healthy, empty when it is.
    """

    address: PciAddress
    pf: PciAddress | None
    numa_node: int | None
    nodes: tuple[str, ...]
    mounts: tuple[str, ...]
    reason: str = ""

    @property
    def healthy(self) -> bool:
        """Whether the kubelet may give it to a pod."""
        return not self.reason


Listing = dict[str, tuple[Device, ...]]
"""Resource name without its namespace (cy, dc, generic) to its devices. Treated as immutable."""


class Holder(Struct, frozen=True):
    """Who has a device, as "namespace/pod/container", and the NUMA node that it had when it was allocated."""

    name: str
    numa_node: int | None = None
