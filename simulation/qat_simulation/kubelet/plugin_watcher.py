"""The kubelet's plugin manager (pkg/kubelet/pluginmanager, v1.36): it registers plugins whose sockets it finds.

Theory of operation: a socket that appears in plugins_registry, or in any directory there, is desired from then on under
a new id; a deleted one is no longer desired. Once a second the two lists are reconciled. A registered plugin that is
not desired, or desired under another id, is deregistered. A desired one that is not registered is asked for its name
and registered. Each path has one operation at a time. After a failed operation the path has a backoff from half a
second to two minutes, and only a success ends it.
"""

import asyncio
import itertools
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import grpc.aio
from msgspec import Struct

from qat_server.kubelet.generated import pluginregistration_v1_pb2 as pb
from qat_server.kubelet.generated.pluginregistration_v1_pb2_grpc import RegistrationStub
from qat_server.provisioning.inotify import Inotify

TYPE: Final = "DevicePlugin"
PERIOD: Final = 1.0  # loopSleepDuration
DIAL_TIMEOUT: Final = 10.0
INFO_TIMEOUT: Final = 1.0
NOTIFY_TIMEOUT: Final = 5.0
BACKOFF_FIRST: Final = 0.5
BACKOFF_LAST: Final = 122.0

_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0))


class PluginRefusedError(Exception):
    """The plugin cannot be registered; the text is the one that the plugin gets."""


class Handler(Protocol):
    """The device manager's handler for plugins of its type."""

    async def plugin_found(self, name: str, endpoint: str, versions: Sequence[str]) -> None:
        """ValidatePlugin and RegisterPlugin. Raises PluginRefusedError."""

    async def plugin_gone(self, name: str) -> None:
        """DeRegisterPlugin."""


class _Registered(Struct, frozen=True):
    id: int
    name: str


class _Operation:
    """An operation for a path that is pending or has failed. `backoff` in seconds."""

    def __init__(self) -> None:
        self.pending = True
        self.backoff = 0.0
        self.not_before = 0.0


class PluginWatcher:
    """Runs between `start` and `stop`, once; a kubelet makes a new one at each start. `period` in seconds."""

    def __init__(self, directory: Path, handler: Handler, clock: Callable[[], float], period: float = PERIOD) -> None:
        self._directory = directory
        self._handler = handler
        self._clock = clock
        self._period = period
        self._ids = itertools.count(1)
        self._desired: dict[Path, int] = {}
        self._registered: dict[Path, _Registered] = {}
        self._operations: dict[Path, _Operation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._inotify = Inotify(self._created, self._deleted)

    def start(self) -> None:
        """Make the directory, find the sockets in it, and begin to reconcile."""
        os.makedirs(self._directory, mode=0o750, exist_ok=True)
        self._traverse(self._directory)
        self._spawn(self._reconcile_forever())

    async def stop(self) -> None:
        """Cancel all operations; no plugin is notified."""
        self._inotify.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def settled(self) -> bool:
        """Whether exactly the sockets that were found are registered, with their last ids."""
        return self._desired == {path: registered.id for path, registered in self._registered.items()}

    # pluginwatcher/plugin_watcher.go

    def _traverse(self, top: Path) -> None:
        """Watch a directory and all below. It includes hidden directories, which `_created` would ignore."""
        for directory, _, names in os.walk(top):
            try:
                self._inotify.add(Path(directory))
            except OSError:  # it was removed meanwhile
                continue
            for name in sorted(names):
                self._created(Path(directory) / name)

    def _created(self, path: Path) -> None:
        if path.name.startswith("."):
            return
        try:
            mode = path.stat().st_mode
        except OSError:
            return
        if stat.S_ISDIR(mode):
            self._traverse(path)
        elif stat.S_ISSOCK(mode):
            self._desired[path] = next(self._ids)

    def _deleted(self, path: Path) -> None:
        self._desired.pop(path, None)

    # reconciler/reconciler.go

    async def _reconcile_forever(self) -> None:
        while True:
            self._reconcile()
            await asyncio.sleep(self._period)

    def _reconcile(self) -> None:
        for path, registered in list(self._registered.items()):
            if self._desired.get(path) != registered.id:
                self._run(path, partial(self._deregister, path, registered.name))
        for path, number in self._desired.items():
            if path not in self._registered or self._registered[path].id != number:
                self._run(path, partial(self._register, path, number))

    def _run(self, path: Path, function: Callable[[], Coroutine[object, object, None]]) -> None:
        """goroutinemap.go: start the operation, unless one is pending for the path or its backoff is not over."""
        operation = self._operations.get(path)
        if operation is None:
            operation = self._operations[path] = _Operation()
        elif operation.pending or self._clock() <= operation.not_before:
            return
        operation.pending = True
        self._spawn(self._operate(path, operation, function))

    async def _operate(
        self, path: Path, operation: _Operation, function: Callable[[], Coroutine[object, object, None]]
    ) -> None:
        try:
            await function()
        except (PluginRefusedError, grpc.aio.AioRpcError, TimeoutError):
            operation.pending = False
            operation.backoff = min(operation.backoff * 2 or BACKOFF_FIRST, BACKOFF_LAST)
            operation.not_before = self._clock() + operation.backoff
        else:
            del self._operations[path]

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # operationexecutor/operation_generator.go

    async def _register(self, path: Path, number: int) -> None:
        async with grpc.aio.insecure_channel(f"unix:{path}", options=_OPTIONS) as channel:
            async with asyncio.timeout(DIAL_TIMEOUT):
                await channel.channel_ready()
            info = await RegistrationStub(channel).GetInfo(pb.InfoRequest(), timeout=INFO_TIMEOUT)
            try:
                if info.type != TYPE:
                    raise PluginRefusedError(f"no handler registered for plugin type: {info.type} at socket {path}")
                # Before the registration is complete, so that the plugin can be deregistered meanwhile.
                self._registered[path] = _Registered(number, info.name)
                await self._handler.plugin_found(info.name, info.endpoint or str(path), info.supported_versions)
            except PluginRefusedError as refused:
                self._registered.pop(path, None)
                await self._notify(channel, f"RegisterPlugin error -- {refused}")
                raise
            try:
                await self._notify(channel, "")
            except grpc.aio.AioRpcError:
                self._registered.pop(path, None)
                await self._handler.plugin_gone(info.name)
                raise

    async def _notify(self, channel: grpc.aio.Channel, error: str) -> None:
        status = pb.RegistrationStatus(plugin_registered=not error, error=error)
        await RegistrationStub(channel).NotifyRegistrationStatus(status, timeout=NOTIFY_TIMEOUT)

    async def _deregister(self, path: Path, name: str) -> None:
        self._registered.pop(path, None)
        await self._handler.plugin_gone(name)
