"""Asks the helper what doctor wants to know: whether it answers at all, and each PF's heartbeat."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qat_server.counters import Counters
from qat_server.doctor.facts import DEAD, Helper
from qat_server.helper_client import HelperClient, HelperError
from qat_shared.pci import PciAddress

PATIENCE: Final = 5.0
"""Seconds to reach the helper, or to be told that it is not there."""


async def ask_helper(socket: Path, pfs: Sequence[PciAddress]) -> Helper:
    """What the helper at `socket` says. `pfs`: those that are on their kernel driver."""
    client = HelperClient(socket, Counters())
    task = asyncio.create_task(client.run())
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await client.tried.wait()
        if not client.connected:
            return Helper(error=client.error)
        return Helper(
            error="",
            version=client.version,
            operations=client.operations,
            heartbeats={pf: await _heartbeat(client, pf) for pf in pfs},
        )
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _heartbeat(client: HelperClient, pf: PciAddress) -> str:
    try:
        return "" if (await client.heartbeat(pf)).alive else DEAD
    except HelperError as error:
        return error.message
