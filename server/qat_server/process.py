"""The server as a process: what is opened before the sandbox, the signals that end it, the exit status."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator

import uvloop

from qat_server import http_endpoint, logs, sandbox
from qat_server.plugin import Plugin
from qat_server.settings import Settings

log = logs.get(__name__)


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT: the exit status."""
    failed: list[BaseException] = []
    try:
        # Opened before anything is done, so that an address in use is told at once, and none can be made later.
        address = settings.metrics_address
        sockets = [] if address is None else http_endpoint.listen(address)
        uvloop.run(_serve(Plugin(settings, sockets, sandbox.enter(settings))))
    except* OSError as group:
        failed = list(_leaves(group))
    for error in failed:
        log.error("cannot go on", why=str(error))
    return 1 if failed else 0


async def _serve(plugin: Plugin) -> None:
    task = asyncio.ensure_future(plugin.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    log.info("ended")


def _leaves(group: BaseExceptionGroup[OSError]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
