"""The server as a process: what is opened before the sandbox, the signals that end it, the exit status."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

import uvloop

from qat_server import http_endpoint, logs, sandbox
from qat_server.plugin import Plugin
from qat_server.service_manager import ServiceManager
from qat_server.settings import Settings
from qat_server.start import PATIENCE, Start

log = logs.get(__name__)


def run(settings: Settings, patience: float = PATIENCE) -> int:
    """Serve until SIGTERM or SIGINT: the exit status. `patience`: seconds that the start may take (start.py)."""
    failed: list[BaseException] = []
    try:
        # Opened before anything is done, so that an address in use is told at once, and none can be made later.
        address = settings.metrics_address
        sockets = [] if address is None else http_endpoint.listen(address)
        manager = ServiceManager.from_environment(os.environ)
        uvloop.run(_serve(Plugin(settings, sockets, sandbox.enter(settings)), manager, patience))
    except* OSError as group:
        failed = list(_leaves(group))
    for error in failed:
        log.error("cannot go on", why=str(error))
    return 1 if failed else 0


async def _serve(plugin: Plugin, manager: ServiceManager | None, patience: float) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(plugin.run())

    def stop() -> None:
        if manager is not None:
            manager.stopping()
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if manager is not None:
        start = Start(manager, lambda: plugin.readiness.missing(plugin.inventory), lambda: plugin.listing, patience)
        plugin.on_look = start.looked
        starting = asyncio.ensure_future(start.run())
        task.add_done_callback(lambda _: starting.cancel())
    with contextlib.suppress(asyncio.CancelledError):
        await task
    log.info("ended")
    if manager is not None:
        manager.close()


def _leaves(group: BaseExceptionGroup[OSError]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
