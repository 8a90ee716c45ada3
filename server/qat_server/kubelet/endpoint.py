"""One resource's endpoint: its socket, and its registration with the kubelet for as long as it runs.

Theory of operation: the socket is served first, since the kubelet calls back while it registers; then it is registered
in one of two ways (registration.py); then wait. Whenever *any* ListAndWatch stream ends, register again: the kubelet,
at the end of an older stream, drops the client that the newest registration made (device manager, runClient and
getClient). So nothing is ever concluded from a stream that was open before. A kubelet that fails, or ends streams at
once, is asked again after a growing pause.
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
from qat_server.kubelet.device_plugin import AllocationObserver, DevicePlugin
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import add_DevicePluginServicer_to_server
from qat_server.kubelet.registration.registrar import CannotRegisterError, Registrar, Timing
from qat_server.kubelet.sockets import grpc_socket
from qat_server.kubelet.sockets.grpc_socket import BoundSocket
from qat_shared import NAMESPACE
from qat_shared.pci import PciAddress

log = logs.get(__name__)

SOCKET_MODE: Final = 0o660
STOP_GRACE: Final = 0.2
"""Seconds that an answer under way is given when the endpoint ends."""


class EndpointState(Struct, frozen=True):
    """One resource and the kubelet: registered now, how often so far, and why not (the last error, "" for none)."""

    registered: bool = False
    registrations: int = 0
    error: str = ""


class Endpoint:
    """Made for one resource: `update` at any time, `run` once, `withdraw` to end it from outside.

    `state` is replaced at each change. `handed_out` maps devices to the time, by `clock`, of their last allocation.
    `on_lost` is called when the socket's directory cannot be used.
    """

    def __init__(
        self,
        name: str,
        registrar: Registrar,
        policy: AllocationPolicy,
        counters: Counters,
        usage: AllocationObserver,
        on_lost: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        timing: Timing | None = None,
    ) -> None:
        self.name = name
        self._on_lost = on_lost
        self.state = EndpointState()
        self._registrar = registrar
        self._timing = timing or Timing()
        self._plugin = DevicePlugin(name, policy, counters, usage, clock)
        self._server: grpc.aio.Server | None = None
        self._bound: BoundSocket | None = None
        self._withdrawing = asyncio.Event()
        self._ended = asyncio.Event()
        self._running = False
        self._short_lived = 0  # streams in a row that ended before they had settled

    @property
    def resource(self) -> str:
        """The resource's full name."""
        return f"{NAMESPACE}/{self.name}"

    @property
    def socket_path(self) -> Path:
        """Where it is served."""
        return self._registrar.socket_path

    @property
    def handed_out(self) -> dict[PciAddress, float]:
        """The devices that have been allocated since the start: they may be in use."""
        return self._plugin.handed_out

    def update(self, devices: Sequence[Device]) -> None:
        """Replace the list of devices."""
        self._plugin.update(devices)

    async def withdraw(self) -> None:
        """End `run`, and return when all is closed."""
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
        pause, patience = 0.0, timing.stream_first
        while True:
            await asyncio.sleep(pause)
            began = loop.time()
            try:
                await self._serve()
                ended = streams.ended
                await self._registrar.register(streams)
                await self._until_watched(ended, patience)
            except CannotRegisterError as error:
                self._failed(str(error))
                patience = min(patience * 2, timing.stream_last)
                # An attempt that waited for the kubelet was pause enough: it may be there in this very moment.
                waited = loop.time() - began >= timing.after_failure
                pause = 0.0 if waited else self._longer(pause, timing.after_failure)
                continue
            patience = timing.stream_first
            if await self._watched(ended):
                self._short_lived = 0
            else:
                self._short_lived += 1
            self._lost()
            # The first end is answered at once: mostly it is a kubelet's restart.
            pause = 0.0 if self._short_lived < 2 else self._longer(pause, timing.after_stream)

    async def _watched(self, ended: int) -> bool:
        """Until a stream ends: whether the streams had lived for a while."""
        streams = self._plugin.streams
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.settled):
                while streams.ended == ended:
                    await streams.change()
            return False
        if self._short_lived >= 2:
            self._say_registered()
        while streams.ended == ended:
            await streams.change()
        return True

    def _longer(self, pause: float, most: float) -> float:
        return min(max(pause * 2, self._timing.first), most)

    async def _serve(self) -> None:
        """Serve at the socket's path, anew if that registers, or if the file has gone. Raises CannotRegisterError."""
        if self._bound is not None:
            if not self._bound.exists():
                log.warning(
                    "endpoint's socket has gone, serving anew", resource=self.resource, socket=str(self.socket_path)
                )
            elif not await self._registrar.needs_new_socket(self._plugin.streams):
                return
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        add_DevicePluginServicer_to_server(self._plugin, server)
        self._registrar.add_to(server)
        try:
            bound = await grpc_socket.start(server, self.socket_path, SOCKET_MODE)
        except OSError as error:
            await server.stop(None)
            self._on_lost()
            raise CannotRegisterError(f"cannot serve {self.socket_path}: {error.strerror or error}") from error
        except BaseException:
            await server.stop(None)
            raise
        # Only now the old one: a kubelet that connects at any moment finds somebody there.
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

    async def _until_watched(self, ended: int, patience: float) -> None:
        """Return when a stream was opened or has ended since. Raises CannotRegisterError."""
        streams = self._plugin.streams
        try:
            async with asyncio.timeout(patience):
                while not streams.fresh and streams.ended == ended:
                    await streams.change()
        except TimeoutError:
            why = "the kubelet accepted the registration but did not ask for the devices"
            raise CannotRegisterError(why) from None
        self.state = replace(self.state, registered=True, registrations=self.state.registrations + 1, error="")
        if self._short_lived < 2:
            self._say_registered()

    def _say_registered(self) -> None:
        log.info(
            "resource registered",
            resource=self.resource,
            devices=self._plugin.count,
            registrations=self.state.registrations,
        )

    def _failed(self, why: str) -> None:
        if why != self.state.error:
            log.warning("cannot register with the kubelet", resource=self.resource, why=why)
        self.state = replace(self.state, registered=False, error=why)

    def _lost(self) -> None:
        self.state = replace(self.state, registered=False, error="the kubelet ended the ListAndWatch stream")
        if self._short_lived < 2:
            log.info("kubelet ended the stream, registering again", resource=self.resource)
        elif self._short_lived == 2:
            log.warning("kubelet ends streams at once, registering again with pauses", resource=self.resource)
