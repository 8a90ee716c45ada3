"""What cannot be read for a moment, while something changes that no further uevent will tell of."""

from qat_simulation.node.description import LoneVf, Node
from qat_simulation.running_node import running_node

GENERIC = "qat.intel.com/generic"
LONE = Node(vfs=tuple(LoneVf(address=f"0000:0{n}:00.0") for n in range(1, 5)))


async def test_a_vf_that_vanishes_while_the_bus_cannot_be_read_is_seen_soon_after() -> None:
    async with running_node(LONE, ("--resync-interval=1h",)) as node:
        node.start_helper()
        node.start_server()
        await node.until("registered", lambda: node.kubelet.allocatable().get(GENERIC) == 4)
        await node.until_status("all is bound", lambda status: status.ready)
        devices = node.kernel.sysfs_root / "bus/pci/devices"
        away = devices.rename(devices.with_name("devices.away"))
        node.kernel.unplug("0000:02:00.0")
        await node.until_status("unreadable", lambda status: any("not a readable" in why for why in status.not_ready))
        away.rename(devices)
        await node.until("told", lambda: node.kubelet.allocatable().get(GENERIC) == 3)
        await node.until_status("ready", lambda status: status.ready)
