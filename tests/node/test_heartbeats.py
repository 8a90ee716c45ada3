"""PFs whose heartbeat is lost, or hangs, on a node: their VFs are not offered."""

import os

from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import running_node

CY = "qat.intel.com/cy"
FIRST = Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, numa_node=0)
SECOND = Pf(address="0000:70:00.0", services="sym;asym", total_vfs=4)


async def test_a_pf_without_a_heartbeat_from_the_start_is_never_offered() -> None:
    dead = Pf(address="0000:70:00.0", services="sym;asym", total_vfs=4, heartbeat=-1)
    async with running_node(Node(pfs=(FIRST, dead)), ("--health-interval=1h",)) as node:
        node.start_helper()
        await node.until("the helper listens", node.helper_socket.exists)
        node.start_server()
        seen = set()

        def all_listed() -> bool:
            seen.add(node.kubelet.allocatable().get(CY, 0))
            return node.kubelet.capacity().get(CY) == 8

        await node.until("listed", all_listed)
        await node.until_status("ready", lambda status: status.ready)
        assert all_listed()
        assert max(seen) == 4


async def test_a_heartbeat_that_hangs_is_lost_and_holds_up_no_other() -> None:
    async with running_node(Node(pfs=(FIRST, SECOND)), ("--health-interval=200ms",)) as node:
        node.start_helper()
        node.start_server()
        await node.until("listed", lambda: node.kubelet.allocatable().get(CY) == 8)
        path = node.kernel.sysfs_root / "kernel/debug/qat_4xxx_0000:6b:00.0/heartbeat/status"
        path.unlink()
        os.mkfifo(path)
        try:
            node.kernel.set_heartbeat(SECOND.address, -1)
            await node.until("the other's loss is told first", lambda: node.kubelet.allocatable().get(CY) == 4)
            await node.until("then that of the one that hangs", lambda: node.kubelet.allocatable().get(CY) == 0)
            reasons = {pf.address: pf.reason for pf in (await node.status()).pfs}
            assert reasons[FIRST.address] == "PF 0000:6b:00.0 has not answered its heartbeat query"
        finally:
            descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            os.write(descriptor, b"0\n")
            os.close(descriptor)
