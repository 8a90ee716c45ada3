"""The queries of doctor: each PF's heartbeat from the helper, and refused binds from a running server."""

import asyncio
import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qat_server.command_line.doctor.observations import NO_HEARTBEAT, HelperAnswer
from qat_server.command_line.status.client import StatusError, decoded, fetch_local
from qat_server.helper_client.client import HelperClient, HelperError
from qat_server.instrumentation.counters import Counters
from qat_server.observability.status_format import STATUS_SOCKET
from qat_shared.pci import PciAddress

TIMEOUT: Final = 5.0
"""Seconds that the first attempt to connect to the helper may take."""


async def query_helper(socket: Path, pfs: Sequence[PciAddress]) -> HelperAnswer:
    """Query the helper at `socket`. `pfs`: the PFs that are bound to their kernel driver."""
    client = HelperClient(socket, Counters())
    task = asyncio.create_task(client.run())
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                await client.first_attempt_ended.wait()
        if not client.connected:
            return HelperAnswer(error=client.error)
        return HelperAnswer(
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
        return "" if (await client.heartbeat(pf)).alive else NO_HEARTBEAT
    except HelperError as error:
        return error.message


def query_server(directory: Path) -> tuple[str, ...]:
    """The VFs whose bind the kernel refused to permit, from the server whose sockets are in `directory`.

    Empty if no server answers there, since nothing is known then.
    """
    try:
        status = decoded(fetch_local([directory / STATUS_SOCKET]))
    except StatusError:
        return ()
    # The helper's message contains the kernel's text for the errno. It is always in the C locale: Python sets no other
    # locale for messages, neither in the helper nor here.
    phrases = [f": {os.strerror(number)}" for number in (errno.EACCES, errno.EPERM)]
    return tuple(vf.address for vf in status.vfs if any(phrase in vf.reason for phrase in phrases))
