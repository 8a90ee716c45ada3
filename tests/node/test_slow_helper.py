"""A helper that does not answer holds up what needs it, and nothing else."""

import signal

from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import running_node

CY, DC = "qat.intel.com/cy", "qat.intel.com/dc"
TWO = Node(
    pfs=(
        Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, numa_node=0),
        Pf(address="0000:70:00.0", services="dc", total_vfs=2),
    )
)
CALL_TIMEOUT = 20.0


async def test_a_vf_that_vanishes_is_told_while_another_pfs_services_cannot_be_read() -> None:
    async with running_node(TWO, ("--resync-interval=200ms", "--health-interval=100ms")) as node:
        node.start_helper()
        node.start_server()
        await node.until("registered", lambda: node.kubelet.allocatable() == {CY: 4, DC: 2})
        await node.until_status("all is bound", lambda status: status.ready)
        assert node.helper is not None
        node.helper.send_signal(signal.SIGSTOP)
        try:
            (node.kernel.sysfs_root / "devices/pci0000:70/0000:70:00.0/qat/cfg_services").unlink()
            await node.until("its services are not known", lambda: node.kubelet.allocatable().get(DC) == 0)
            node.kernel.unplug("0000:6b:00.2")
            await node.until("told", lambda: node.kubelet.allocatable()[CY] == 3, CALL_TIMEOUT / 2)
        finally:
            node.helper.send_signal(signal.SIGCONT)
