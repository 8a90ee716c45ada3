"""The nodes of this suite, in addition to those of tests/kubelet. qat_simulation.node.description has the format."""

from typing import Final

from qat_simulation.node.description import LoneVf, Node, OtherDevice, Pf

PF: Final = "0000:6b:00.0"
VF: Final = "0000:6b:00.1"
VF2: Final = "0000:6b:00.2"

SMALL: Final = Node(pfs=(Pf(address=PF, services="sym;asym", total_vfs=4, numa_node=0),))
UIO: Final = Node(pfs=SMALL.pfs, drivers=("igb_uio", "vfio-pci"))
"""With igb_uio first, VFs have BARs."""
TWO_PFS: Final = Node(
    pfs=tuple(
        Pf(address=f"0000:{bus}:00.0", services="sym;asym", numa_node=numa) for numa, bus in enumerate(("6b", "e8"))
    )
)
TWO_SMALL: Final = Node(
    pfs=tuple(
        Pf(address=f"0000:{bus}:00.0", services="sym;asym", total_vfs=2, numa_node=numa)
        for numa, bus in enumerate(("6b", "e8"))
    )
)
IN_A_VM: Final = Node(
    vfs=tuple(LoneVf(address=f"0000:a{n}:00.0", numa_node=0) for n in range(1, 4)),
    others=(OtherDevice(address="0000:b1:00.0", vendor="8086", device="1572", class_code="0b4000"),),
)
"""VFs without their PF, as a virtual machine is passed them, and a device that is nobody's here."""
