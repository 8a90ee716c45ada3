"""A device as the kubelet sees it, the listing of all devices, and the pod that holds one."""

from msgspec import Struct

from qat_shared import NAMESPACE
from qat_shared.pci import PciAddress


class Device(Struct, frozen=True):
    """One VF as it is listed to the kubelet.

    `nodes`: device files, given to the container as read-write. `mounts`: host paths, mounted at the same path.
    `reason`: why the device is unhealthy, "" if it is healthy.
    """

    address: PciAddress
    pf: PciAddress | None
    numa_node: int | None
    nodes: tuple[str, ...]
    mounts: tuple[str, ...]
    reason: str = ""

    @property
    def healthy(self) -> bool:
        """Whether the kubelet may allocate the device to a pod."""
        return not self.reason


Listing = dict[str, tuple[Device, ...]]
"""Resource name without its namespace (cy, dc, generic) to its devices. Treated as immutable."""


def summary(listing: Listing) -> str:
    """The healthy devices of each resource, for people: "4 qat.intel.com/cy, 2 qat.intel.com/dc"."""
    counts = [f"{sum(each.healthy for each in devices)} {NAMESPACE}/{name}" for name, devices in listing.items()]
    return ", ".join(counts) or "no devices"


class Holder(Struct, frozen=True):
    """The container that holds a device, as "namespace/pod/container", and the device's NUMA node at allocation."""

    name: str
    numa_node: int | None = None
