"""The server's run loop: its tasks, and the directory that it serves in.

All tasks are in one task group. An error that a retry cannot fix ends the process, and the supervisor (the kubelet,
systemd) starts it again; an error of one device stays with that device.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Final

from qat_server.devices.change_queue import ChangeQueue
from qat_server.helper_client.client import HelperClient
from qat_server.kubelet.endpoints import Endpoints
from qat_server.kubelet.sockets.endpoint_directory import DirectoryGoneError, EndpointDirectory
from qat_server.kubelet.sockets.socket_files import remove_leftovers
from qat_server.reconciler import Reconciler

_FIRST_CONNECTION_WAIT: Final = 2.0
"""Seconds that the start waits for the first attempt to connect to the helper."""

TaskFunction = Callable[[], Coroutine[None, None, None]]


@dataclass
class RunLoop:
    """`background` tasks run from start to end, `serving` tasks while the socket directory is there.

    `on_reconciled` is called after each reconcile.
    """

    helper: HelperClient
    directory: EndpointDirectory
    endpoints: Endpoints
    queue: ChangeQueue
    reconciler: Reconciler
    background: Sequence[TaskFunction]
    serving: Sequence[TaskFunction]
    on_reconciled: Callable[[], None] = lambda: None

    async def run(self) -> None:
        """Serve until cancelled. Raises an ExceptionGroup of OSError when no retry can help."""
        async with asyncio.TaskGroup() as tasks:
            for task in self.background:
                tasks.create_task(task())
            with contextlib.suppress(TimeoutError):  # the helper may accept the connection and never answer
                async with asyncio.timeout(_FIRST_CONNECTION_WAIT):
                    await self.helper.first_attempt_ended.wait()
            while True:
                await self.directory.prepare()
                async with self.directory.locked():
                    remove_leftovers(self.directory.path)
                    await self._serve()

    async def _serve(self) -> None:
        """Serve in the directory; return when it has gone."""
        self.reconciler.reset("the devices have not been read yet")
        self.queue.rescan()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.directory.watch())
                for task in self.serving:
                    tasks.create_task(task())
                async with asyncio.TaskGroup() as work:
                    while True:
                        if await self.reconciler.reconcile_safely(await self.queue.next(), work):
                            self.on_reconciled()
        except* DirectoryGoneError:
            self.endpoints.clear()
            self.reconciler.reset("the socket directory was removed")
