"""The server's run loop: its tasks, and the directory that it serves in.

All tasks are in one task group. An error that no retry can mend ends the process, and the supervisor (the kubelet,
systemd) starts it again; an error of one device stays with that device.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Final

from qat_server.devices.change_queue import ChangeQueue
from qat_server.devices.health import HealthMonitor
from qat_server.devices.uevents import UeventListener
from qat_server.helper_client.client import HelperClient
from qat_server.kubelet.endpoints import Endpoints
from qat_server.kubelet.sockets import grpc_socket
from qat_server.kubelet.sockets.endpoint_directory import DirectoryGoneError, EndpointDirectory
from qat_server.kubelet.usage import Usage
from qat_server.observability.status_server import StatusServer
from qat_server.provisioning.watch import ConfigurationWatch
from qat_server.reconciler import Reconciler

_HELPER_PATIENCE: Final = 2.0
"""Seconds that the start waits for the end of the first attempt to reach the helper."""


class RunLoop:
    """One server. `run` works until cancelled; `on_reconciled` is called after each reconcile."""

    def __init__(
        self,
        reconciler: Reconciler,
        queue: ChangeQueue,
        helper: HelperClient,
        uevents: UeventListener,
        health: HealthMonitor,
        usage: Usage,
        configuration: ConfigurationWatch | None,
        directory: EndpointDirectory,
        endpoints: Endpoints,
        status_server: StatusServer,
        metrics_sockets: Sequence[socket.socket],
        resync_interval: float,
    ) -> None:
        self.on_reconciled: Callable[[], None] = lambda: None
        self._reconciler = reconciler
        self._queue = queue
        self._helper = helper
        self._uevents = uevents
        self._health = health
        self._usage = usage
        self._configuration = configuration
        self._directory = directory
        self._endpoints = endpoints
        self._status_server = status_server
        self._metrics_sockets = metrics_sockets
        self._resync_interval = resync_interval

    async def run(self) -> None:
        """Serve until cancelled. Raises an ExceptionGroup of OSError when no retry can help."""
        async with asyncio.TaskGroup() as tasks:
            if self._metrics_sockets:
                tasks.create_task(self._status_server.serve(self._metrics_sockets))
            tasks.create_task(self._helper.run())
            with contextlib.suppress(TimeoutError):  # a helper that accepts and does not answer
                async with asyncio.timeout(_HELPER_PATIENCE):
                    await self._helper.first_attempt_ended.wait()
            while True:
                await self._directory.prepare()
                async with self._directory.held():
                    grpc_socket.remove_leftovers(self._directory.path)
                    await self._serve()

    async def _serve(self) -> None:
        """Serve in the directory; return when it has gone."""
        self._reconciler.error = "the devices have not been read yet"
        self._queue.rescan()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._directory.until_gone())
                tasks.create_task(self._status_server.serve_locally(self._directory.path))
                if self._configuration is not None:
                    tasks.create_task(self._configuration.run())
                tasks.create_task(self._uevents.run())
                tasks.create_task(self._queue.resync(self._resync_interval))
                tasks.create_task(self._usage.run())
                tasks.create_task(self._health.run())
                async with asyncio.TaskGroup() as work:
                    while True:
                        if await self._reconciler.reconcile_safely(await self._queue.next(), work):
                            self.on_reconciled()
        except* DirectoryGoneError:
            self._endpoints.forget()
            self._reconciler.error = "the socket directory has gone"
