"""A log that was cut or exchanged while the helper was down: the server tells, since it keeps the last head."""

import asyncio
import signal

import pytest

from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import RunningNode, running_node

ONE_PF = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=2, numa_node=0),))
SAID = "audit log does not continue"


async def metric(node: RunningNode, name: str) -> float:
    _, body = await node.get("/metrics")
    found = [line.split()[1] for line in body.splitlines() if line.startswith(name.encode() + b" ")]
    return float(found[0]) if found else 0.0


@pytest.mark.parametrize("how", ["whole", "cut", "gone"])
async def test_the_server_tells_once_when_the_log_does_not_continue(how: str) -> None:
    async with running_node(ONE_PF, ("--health-interval=100ms",)) as node:
        node.start_helper()
        node.start_server()
        status = await node.until_status("both are bound", lambda status: status.ready and len(status.vfs) == 2)
        assert status.helper.audit_broken == ""
        await node.stop_helper(signal.SIGKILL)
        await node.until_status("the helper is away", lambda status: not status.helper.connected)
        lines = node.audit_log.read_bytes().splitlines(keepends=True)
        if how == "cut":
            node.audit_log.write_bytes(b"".join(lines[: len(lines) // 2]))
        elif how == "gone":
            node.audit_log.unlink()
        node.start_helper()
        status = await node.until_status("the helper is back", lambda status: status.helper.connected)
        assert bool(status.helper.audit_broken) == (how != "whole")
        heartbeats = 'qat_plugin_helper_requests_total{operation="ReadHeartbeat",outcome="ok"}'
        asked = await metric(node, heartbeats)
        async with asyncio.timeout(120):
            while await metric(node, heartbeats) < asked + 3:
                await asyncio.sleep(0.02)
        assert await metric(node, "qat_plugin_audit_breaks_total") == (how != "whole")
        assert node.log("server").count(SAID) == (how != "whole")
        if how != "whole":
            head = f"went back to line {'1' if how == 'gone' else len(lines) // 2 + 1} "
            assert head in status.helper.audit_broken
