"""One resource's endpoint: its socket, and its registration with the kubelet for as long as it runs.

Theory of operation: the socket is served first, since the kubelet calls back while it registers. Then the endpoint is
registered in one of two ways (registration/). Whenever *any* ListAndWatch stream ends, it registers again: at the end
of an older stream, the kubelet drops the client that the newest registration made (device manager, runClient and
getClient). So a stream that was open before proves nothing. Registration is retried with a growing pause if the
kubelet fails, or ends streams immediately.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import grpc.aio
from msgspec import Struct
from msgspec.structs import replace

from qat_server import logs
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.allocation import AllocationPolicy
from qat_server.kubelet.device import Device
from qat_server.kubelet.device_plugin import DevicePlugin, PodUsage
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import add_DevicePluginServicer_to_server
from qat_server.kubelet.registration.registrar import CannotRegisterError, Registrar, Timing
from qat_server.kubelet.sockets import grpc_socket
from qat_server.kubelet.sockets.socket_files import BoundSocket
from qat_shared import NAMESPACE
from qat_shared.pci import PciAddress

log = logs.get(__name__)

SOCKET_MODE: Final = 0o660
STOP_GRACE: Final = 0.2
"""Seconds that RPCs in progress get when the endpoint stops."""


class EndpointState(Struct, frozen=True):
    """Whether the resource is registered, how often it has been so far, and the last error ("" for none)."""

    registered: bool = False
    registrations: int = 0
    error: str = ""


class Endpoint:
    """The endpoint of one resource: call `update` at any time, `run` once, and `withdraw` to end it from outside.

    `state` is replaced at each change. `on_socket_error` is called when no socket can be made in the directory.
    """

    def __init__(
        self,
        name: str,
        registrar: Registrar,
        policy: AllocationPolicy,
        counters: Counters,
        usage: PodUsage,
        on_socket_error: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        timing: Timing | None = None,
    ) -> None:
        self.name = name
        self._on_socket_error = on_socket_error
        self.state = EndpointState()
        self._registrar = registrar
        self._timing = timing or Timing()
        self._plugin = DevicePlugin(name, policy, counters, usage, clock)
        self._server: grpc.aio.Server | None = None
        self._bound: BoundSocket | None = None
        self._withdrawing = asyncio.Event()
        self._ended = asyncio.Event()
        self._running = False
        self._short_streams = 0  # streams in a row that ended before they had settled

    @property
    def resource(self) -> str:
        """The resource's full name."""
        return f"{NAMESPACE}/{self.name}"

    @property
    def socket_path(self) -> Path:
        """The path at which the endpoint is served."""
        return self._registrar.socket_path

    @property
    def allocated_at(self) -> dict[PciAddress, float]:
        """The devices allocated since the start, with the time of their last allocation: they may be in use."""
        return self._plugin.allocated_at

    def update(self, devices: Sequence[Device]) -> None:
        """Replace the list of devices."""
        self._plugin.update(devices)

    async def withdraw(self) -> None:
        """End `run`, and return when the endpoint has stopped."""
        self._withdrawing.set()
        if self._running:
            await self._ended.wait()

    async def run(self) -> None:
        """Serve and stay registered until withdrawn or cancelled."""
        self._running = True
        try:
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._stay_registered())
                await self._withdrawing.wait()
                work.cancel()
        finally:
            try:
                self.state = replace(self.state, registered=False, error="withdrawn")
                self._plugin.withdraw()
                await self._stop_serving()
            finally:
                self._ended.set()

    async def _stay_registered(self) -> None:
        loop = asyncio.get_running_loop()
        timing, streams = self._timing, self._plugin.streams
        pause, stream_timeout = 0.0, timing.stream_first
        while True:
            await asyncio.sleep(pause)
            began = loop.time()
            try:
                await self._serve()
                ended = streams.ended
                await self._registrar.register(streams)
                await self._wait_for_stream(ended, stream_timeout)
            except CannotRegisterError as error:
                self._registration_failed(str(error))
                stream_timeout = min(stream_timeout * 2, timing.stream_last)
                # An attempt that waited for the kubelet was itself the pause: the kubelet may start at this moment.
                waited = loop.time() - began >= timing.after_failure
                pause = 0.0 if waited else self._next_pause(pause, timing.after_failure)
                continue
            stream_timeout = timing.stream_first
            if await self._wait_for_stream_end(ended):
                self._short_streams = 0
            else:
                self._short_streams += 1
            self._stream_ended()
            # No pause after the first end: mostly the kubelet has restarted.
            pause = 0.0 if self._short_streams < 2 else self._next_pause(pause, timing.after_stream)

    async def _wait_for_stream_end(self, ended: int) -> bool:
        """Return when more than `ended` streams have ended: whether that took long enough for no pause to be needed."""
        streams = self._plugin.streams
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.settled):
                while streams.ended == ended:
                    await streams.wait_for_change()
            return False
        if self._short_streams >= 2:
            self._log_registered()
        while streams.ended == ended:
            await streams.wait_for_change()
        return True

    def _next_pause(self, pause: float, longest: float) -> float:
        return min(max(pause * 2, self._timing.first_pause), longest)

    async def _serve(self) -> None:
        """Serve at the socket's path. Recreate the socket if that is needed to register, or if its file was removed.

        Raises CannotRegisterError.
        """
        if self._bound is not None:
            if not self._bound.exists():
                log.warning(
                    "endpoint socket was removed, recreating it", resource=self.resource, socket=str(self.socket_path)
                )
            elif not await self._registrar.needs_new_socket(self._plugin.streams):
                return
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        add_DevicePluginServicer_to_server(self._plugin, server)
        self._registrar.add_services(server)
        try:
            bound = await grpc_socket.start(server, self.socket_path, SOCKET_MODE)
        except OSError as error:
            await server.stop(None)
            self._on_socket_error()
            raise CannotRegisterError(f"cannot serve {self.socket_path}: {error.strerror or error}") from error
        except BaseException:
            await server.stop(None)
            raise
        # The old server stops last, so that the kubelet can connect at any moment.
        former, self._server = self._server, server
        self._bound = bound
        if former is not None:
            await grpc_socket.stop(former, STOP_GRACE)

    async def _stop_serving(self) -> None:
        server, self._server = self._server, None
        bound, self._bound = self._bound, None
        try:
            if server is not None:
                await grpc_socket.stop(server, STOP_GRACE)
        finally:
            if bound is not None:
                bound.remove()

    async def _wait_for_stream(self, ended: int, seconds: float) -> None:
        """Return when a stream has opened, or more than `ended` have ended. Raises CannotRegisterError."""
        streams = self._plugin.streams
        try:
            async with asyncio.timeout(seconds):
                while not streams.fresh and streams.ended == ended:
                    await streams.wait_for_change()
        except TimeoutError:
            why = "the kubelet accepted the registration but did not open a ListAndWatch stream"
            raise CannotRegisterError(why) from None
        self.state = replace(self.state, registered=True, registrations=self.state.registrations + 1, error="")
        if self._short_streams < 2:
            self._log_registered()

    def _log_registered(self) -> None:
        log.info(
            "resource registered",
            resource=self.resource,
            devices=self._plugin.count,
            registrations=self.state.registrations,
        )

    def _registration_failed(self, why: str) -> None:
        if why != self.state.error:
            log.warning("cannot register with the kubelet", resource=self.resource, why=why)
        self.state = replace(self.state, registered=False, error=why)

    def _stream_ended(self) -> None:
        self.state = replace(self.state, registered=False, error="the kubelet ended the ListAndWatch stream")
        if self._short_streams < 2:
            log.info("kubelet ended the stream, registering again", resource=self.resource)
        elif self._short_streams == 2:
            log.warning("kubelet ends streams immediately, registering again with pauses", resource=self.resource)
