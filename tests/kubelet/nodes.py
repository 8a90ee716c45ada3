"""The nodes and the resources that the suite works with."""

from typing import Final

from qat_simulation.node.description import LoneVf, Node, Pf

CY: Final = "qat.intel.com/cy"
DC: Final = "qat.intel.com/dc"
SYM_DC: Final = "qat.intel.com/sym-dc"
GENERIC: Final = "qat.intel.com/generic"

ONE_PF: Final = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, numa_node=0),))

TWO_NODES: Final = Node(
    pfs=tuple(
        Pf(address=f"0000:{bus}:00.0", services="sym;asym", total_vfs=4, numa_node=numa)
        for bus, numa in (("6b", 0), ("70", 0), ("e8", 1))
    )
)
"""Eight VFs of two PFs on NUMA node 0, four of one PF on node 1."""

EVERY_RESOURCE: Final = Node(
    pfs=(
        Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, numa_node=0),
        Pf(address="0000:70:00.0", services="sym;asym", total_vfs=4, numa_node=1),
        Pf(address="0000:e8:00.0", services="dc", total_vfs=3, numa_node=1),
        Pf(address="0001:e8:00.0", services="sym;dc", total_vfs=2, numa_node=0),
        Pf(address="0001:3d:00.0", device="37c8", total_vfs=4, numa_node=1),
    )
)
EVERY_DRIVER: Final = ("--kernel-vf-drivers=4xxxvf,c6xxvf",)
EVERY_ALLOCATABLE: Final = {CY: 8, DC: 3, SYM_DC: 2, GENERIC: 4}

LARGE: Final = Node(
    pfs=tuple(
        Pf(address=f"{domain:04x}:{bus:02x}:00.0", services="sym;asym", total_vfs=16, numa_node=bus % 2)
        for domain in range(4)
        for bus in range(0x10, 0x20)
    )
)
"""64 PFs with 16 VFs each."""

LONE: Final = Node(vfs=tuple(LoneVf(address=f"0000:a{n}:00.0", numa_node=n % 2) for n in range(1, 5)))
"""As in a VM: four VFs (generic) without a PF, which can be removed and found again one by one."""

SMALL: Final = Node(
    pfs=tuple(
        Pf(address=f"0000:{bus}:00.0", services="sym;asym", total_vfs=2, numa_node=numa)
        for numa, bus in enumerate(("6b", "e8"))
    )
)
"""Two PFs with two VFs each, on a NUMA node each."""
