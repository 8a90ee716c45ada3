"""A node with one PF of each kind, and writes to it, for tests of the emulated kernel's stores."""

from qat_simulation.node.description import Node, OtherDevice, Pf
from support.emulated_kernel import PF, VF, real

OLD = "0001:3d:00.0"
FOREIGN = "0000:03:00.0"
DOWN = "0000:70:00.0"
MIXED = Node(
    pfs=(
        Pf(address=PF, numa_node=0, services="sym;asym", total_vfs=4),
        Pf(address=DOWN, services="dc", total_vfs=4, state="down"),
        Pf(address=OLD, device="37c8", total_vfs=2, services="dc"),
    ),
    others=(OtherDevice(address=FOREIGN, vendor="8086", device="1592", driver="ice"),),
)

DRV = "bus/pci/drivers"
OVERRIDE = real(VF, "driver_override")
NUMVFS = real(PF, "sriov_numvfs")
SERVICES = real(PF, "qat/cfg_services")
STATE = real(PF, "qat/state")

OFF = (f"{DRV}/4xxxvf/unbind", VF)
TO_VFIO = (OVERRIDE, "vfio-pci")
NONE = (NUMVFS, "0")
GO_DOWN = (STATE, "down")
