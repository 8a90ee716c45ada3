"""The server as a process: what it opens before the sandbox, the signals that end it, its exit status."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import uvloop

from qat_server import logs
from qat_server.command_line.settings import Settings, SettingsError
from qat_server.composition import Server
from qat_server.host import sandbox
from qat_server.host.service_manager import ServiceManager
from qat_server.host.startup import START_TIMEOUT, Startup
from qat_server.kubelet.device import summary
from qat_server.observability import http_server
from qat_shared import VERSION

log = logs.get(__name__)


def run(settings: Settings, start_timeout: float = START_TIMEOUT) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. `start_timeout`: seconds (startup.py).

    Raises SettingsError.
    """
    failed: list[BaseException] = []
    try:
        # Opened first, so that an address in use is reported at once; after the sandbox none can be opened.
        address = settings.metrics_address
        sockets = [] if address is None else http_server.listen(address.host, address.port)
        manager = ServiceManager.from_environment(os.environ)
        server = Server(settings, _enter_sandbox(settings), sockets)
        uvloop.run(_serve(server, manager, start_timeout))
    except* OSError as group:
        failed = list(_leaves(group))
    for error in failed:
        log.error("cannot go on", why=str(error))
    return 1 if failed else 0


def _enter_sandbox(settings: Settings) -> dict[str, str]:
    logs_in = settings.logging.file_directory
    access = sandbox.Access(
        sysfs_root=settings.sysfs_root,
        socket_directory=settings.socket_directory,
        lock_directory=settings.helper_socket.parent,
        configuration=settings.provisioning_config,
        log_directory=None if logs_in is None else Path(logs_in),
    )
    try:
        return sandbox.enter(access, required=settings.require_sandbox)
    except sandbox.IncompleteSandboxError as error:
        raise SettingsError(f"--require-sandbox: {error}") from None


async def _serve(server: Server, manager: ServiceManager | None, start_timeout: float) -> None:
    loop = asyncio.get_running_loop()
    running = server.run_loop.run() if manager is None else _notifying(server, manager, start_timeout)
    task = asyncio.ensure_future(running)

    def stop() -> None:
        if manager is not None:
            manager.stopping()
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    settings = server.settings
    log.info(
        "started",
        version=VERSION,
        sysfs_root=settings.sysfs_root,
        kubelet_dir=settings.kubelet_dir,
        dpdk_driver=settings.dpdk_driver,
        kernel_vf_drivers=settings.kernel_vf_drivers,
        allocation_policy=settings.allocation_policy,
    )
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await task
        log.info("ended")
    finally:
        if manager is not None:
            manager.close()


async def _notifying(server: Server, manager: ServiceManager, start_timeout: float) -> None:
    """Serve, and notify the service manager of the start. Raises what `RunLoop.run` raises, in a group."""
    startup = Startup(manager, server.unfinished, lambda: summary(server.reconciler.listing), start_timeout)
    server.run_loop.on_reconciled = startup.check
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(startup.run())
        await server.run_loop.run()


def _leaves(group: BaseExceptionGroup[OSError]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
