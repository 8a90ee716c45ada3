"""How long the kubelet's own code is without our devices: after a start of the server, and after one of its own.

As in production where there is root (tests/kubelet), in both ways to register; medians over 20.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Final

from kubelet import harness_process
from kubelet.nodes import CY, TWO_NODES
from kubelet.production import production_node, why_one_user
from qat_server.kubelet.registration.directories import Registration
from qat_server.kubelet.registration.registrar import Timing

TIMES: Final = 20
ALLOCATABLE: Final = {CY: 12}


async def kubelet_times(show: Callable[[str, str, str], None]) -> None:
    """Print one row for each: what, median and slowest."""
    if why_not := harness_process.why_not():
        show("server's start, kubelet's start to allocatable", "not measured", why_not)
        return
    harness_process.build()
    print(f"\nReal kubelet, 12 VFs bound already ({why_one_user() or 'each process as its own user'})", flush=True)
    for registration in Registration:
        after_server, after_kubelet = [], []
        async with production_node(TWO_NODES, registration=registration) as node:
            await node.start(ALLOCATABLE)
            await node.until_bound()
            for _ in range(TIMES):
                await node.stop_server()
                await node.wait(dict.fromkeys(ALLOCATABLE, 0))
                after_server.append(await node.start_again(ALLOCATABLE))
            await asyncio.sleep(Timing().settled + 0.2)
            for _ in range(TIMES):
                await node.kubelet.stop(kill=True)
                began = time.monotonic()
                await node.kubelet.start()
                await node.wait(ALLOCATABLE)
                after_kubelet.append(time.monotonic() - began)
                await asyncio.sleep(Timing().settled + 0.2)  # else the next one is answered as restarts in a row are
        for what, times in (("server's start", after_server), ("killed kubelet's next start", after_kubelet)):
            show(
                f"{registration}: {what} to allocatable, median of {TIMES}",
                f"{statistics.median(times) * 1e3:.0f} ms",
                f"the slowest {max(times) * 1e3:.0f} ms",
            )
