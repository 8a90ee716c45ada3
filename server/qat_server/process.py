"""The server as a process: what is opened before the sandbox, the signals that end it, the exit status."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

import uvloop

from qat_server import logs
from qat_server.command_line.settings import Settings
from qat_server.host import sandbox
from qat_server.host.service_manager import ServiceManager
from qat_server.host.startup import PATIENCE, Start
from qat_server.observability import http_server as http_endpoint
from qat_server.observability import readiness
from qat_server.run_loop import Plugin

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
    task = asyncio.ensure_future(plugin.run() if manager is None else _told(plugin, manager, patience))

    def stop() -> None:
        if manager is not None:
            manager.stopping()
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await task
        log.info("ended")
    finally:
        if manager is not None:
            manager.close()


async def _told(plugin: Plugin, manager: ServiceManager, patience: float) -> None:
    """Serve, and tell the service manager of the start. Raises what `Plugin.run` does, in a group."""
    start = Start(manager, lambda: readiness.missing(plugin), lambda: plugin.listing, patience)
    plugin.on_look = start.looked
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(start.run())
        await plugin.run()


def _leaves(group: BaseExceptionGroup[OSError]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
