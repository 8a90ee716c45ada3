"""The nodes that the cluster's tests work with, as qat_simulation.node.description describes them."""

from typing import Final

from qat_simulation.node.description import Node, Pf

EIGHT: Final = Node(
    pfs=tuple(
        Pf(address=f"0000:{bus}:00.0", services="sym;asym", total_vfs=4, numa_node=numa)
        for numa, bus in enumerate(("6b", "e8"))
    )
)
AS_BOOTED: Final = Node(
    pfs=tuple(Pf(address=pf.address, numa_node=pf.numa_node, total_vfs=4, num_vfs=0) for pf in EIGHT.pfs)
)
"""Services that the driver chose, no VFs."""
BOTH: Final = Node(
    pfs=tuple(
        Pf(address=pf.address, services=services, total_vfs=4, numa_node=pf.numa_node)
        for pf, services in zip(EIGHT.pfs, ("sym;asym", "dc"), strict=True)
    )
)
"""Four VFs of `cy`, four of `dc`."""
