"""A device as the kubelet sees it, the listing of all of them, and the pod that holds one."""

from msgspec import Struct

from qat_shared.pci import PciAddress


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
