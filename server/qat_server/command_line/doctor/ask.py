"""Asks who runs what doctor wants to know: the helper for each PF's heartbeat, the server for what it was refused."""

import asyncio
import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from qat_server.command_line.doctor.facts import DEAD, Helper
from qat_server.command_line.status_client import StatusError, fetch_local
from qat_server.helper_client.client import HelperClient, HelperError
from qat_server.instrumentation.counters import Counters
from qat_server.observability.status import STATUS_SOCKET, decode
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
                await client.first_attempt_ended.wait()
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


def ask_server(directory: Path) -> tuple[str, ...]:
    """The VFs that a server with its sockets in `directory` could not have bound, the kernel not permitting it."""
    try:
        status = decode(fetch_local([directory / STATUS_SOCKET]))
    except (StatusError, msgspec.MsgspecError, UnicodeDecodeError):
        return ()  # none runs, or it is none of ours: then nothing is known
    # The helper's sentence has the kernel's word for the errno in it: always the C locale's, since Python sets no other
    # for messages, there or here.
    words = [f": {os.strerror(number)}" for number in (errno.EACCES, errno.EPERM)]
    return tuple(vf.address for vf in status.vfs if any(word in vf.reason for word in words))


async def _heartbeat(client: HelperClient, pf: PciAddress) -> str:
    try:
        return "" if (await client.heartbeat(pf)).alive else DEAD
    except HelperError as error:
        return error.message
