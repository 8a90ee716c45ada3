"""One resource's endpoint: its socket, and its registration with the kubelet for as long as it runs.

Theory of operation: the socket is served first, since the kubelet calls back inside Register; then Register; then
wait. Whenever *any* ListAndWatch stream ends, register again: the kubelet, at the end of an older stream, drops the
client that the newest registration made (device manager, runClient and getClient). So nothing is ever concluded from
another stream still being open. A kubelet that is down costs one waiting request to the helper every ten seconds; one
that fails, or ends streams at once, is asked again after a growing pause.
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

from qat_server import grpc_socket, kubelet_channel, logs
from qat_server.allocation import AllocationPolicy
from qat_server.counters import Counters
from qat_server.device_plugin import OPTIONS, DevicePlugin
from qat_server.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.generated.deviceplugin_v1beta1_pb2_grpc import RegistrationStub, add_DevicePluginServicer_to_server
from qat_server.grpc_socket import BoundSocket
from qat_server.helper_client import HelperError
from qat_server.inventory import Device
from qat_server.kubelet_channel import KubeletDialer
from qat_server.status import EndpointState
from qat_shared.messages import KubeletService
from qat_shared.pci import PciAddress

log = logs.get(__name__)

NAMESPACE: Final = "qat.intel.com"
VERSION: Final = "v1beta1"
SOCKET_MODE: Final = 0o660
STOP_GRACE: Final = 0.2
"""Seconds that an answer under way is given when the endpoint ends."""


class Timing(Struct, frozen=True):
    """All waits, in seconds. A pause begins with `first` and doubles."""

    first: float = 0.05
    after_failure: float = 1.0  # the longest pause after Register failed
    after_stream: float = 0.4  # ... after a stream that ended too soon: a kubelet restarting often must be kept up with
    settled: float = 1.0  # a stream that lived so long ended for a reason of its own, and no pause is made
    register: float = 12.0  # for Register's answer: the kubelet gives up on its call back after ten
    stream_first: float = (
        1.0  # until the kubelet opens the stream (it takes milliseconds); doubles, since it may be busy
    )
    stream_last: float = 10.0
    kubelet: float = 10.0  # that the helper waits for the kubelet's socket in one request


class CannotRegisterError(Exception):
    """One attempt failed; the text says why, in one sentence."""


class Endpoint:
    """Made for one resource: `update` at any time, `run` once, `withdraw` to end it from outside.

    `state` is replaced at each change. `handed_out` maps devices to when, by `clock`, they were last allocated.
    """

    def __init__(
        self,
        name: str,
        socket_directory: Path,
        helper: KubeletDialer,
        policy: AllocationPolicy,
        counters: Counters,
        on_allocated: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        timing: Timing | None = None,
    ) -> None:
        self.name = name
        self.socket_path = socket_directory / f"{name}.sock"
        self.state = EndpointState()
        self._helper = helper
        self._timing = timing or Timing()
        self._plugin = DevicePlugin(name, policy, counters, on_allocated, clock)
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
        timing = self._timing
        pause, patience = 0.0, timing.stream_first
        while True:
            await asyncio.sleep(pause)
            began = loop.time()
            opened, ended = self._plugin.streams.opened, self._plugin.streams.ended
            try:
                await self._serve()
                await self._register()
                await self._until_watched(opened, ended, patience)
            except CannotRegisterError as error:
                self._failed(str(error))
                patience = min(patience * 2, timing.stream_last)
                # A request that waited for the kubelet's socket, or for an answer, was pause enough.
                waited = loop.time() - began >= timing.after_failure
                pause = timing.first if waited else self._longer(pause, timing.after_failure)
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
        """Serve at the socket's path, anew if the file has gone or is another's. Raises CannotRegisterError."""
        if self._bound is not None:
            if self._bound.exists():
                return
            log.warning(
                "endpoint's socket has gone, serving anew", resource=self.resource, socket=str(self.socket_path)
            )
            await self._stop_serving()
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        add_DevicePluginServicer_to_server(self._plugin, server)
        try:
            self._bound = await grpc_socket.start(server, self.socket_path, SOCKET_MODE)
        except OSError as error:
            await server.stop(None)
            raise CannotRegisterError(f"cannot serve {self.socket_path}: {error.strerror or error}") from error
        except BaseException:
            await server.stop(None)
            raise
        self._server = server

    async def _stop_serving(self) -> None:
        server, self._server = self._server, None
        bound, self._bound = self._bound, None
        try:
            if server is not None:
                await server.stop(STOP_GRACE)
        finally:
            if bound is not None:
                bound.remove()

    async def _register(self) -> None:
        """One Register. Raises CannotRegisterError."""
        request = pb.RegisterRequest(
            version=VERSION,
            endpoint=f"{NAMESPACE}/{self.socket_path.name}",
            resource_name=self.resource,
            options=OPTIONS,
        )
        try:
            connected = await self._helper.open_kubelet_socket(
                KubeletService.REGISTRATION, wait_ms=round(self._timing.kubelet * 1000)
            )
            async with kubelet_channel.over(connected, self.socket_path.parent) as channel:
                await RegistrationStub(channel).Register(request, timeout=self._timing.register)
        except HelperError as error:
            raise CannotRegisterError(error.message) from error
        except OSError as error:
            raise CannotRegisterError(f"cannot speak to the kubelet: {error}") from error
        except grpc.aio.AioRpcError as error:
            raise CannotRegisterError(kubelet_channel.sentence(error)) from error

    async def _until_watched(self, opened: int, ended: int, patience: float) -> None:
        """Return when a stream was opened or has ended since. Raises CannotRegisterError."""
        streams = self._plugin.streams
        try:
            async with asyncio.timeout(patience):
                while streams.opened == opened and streams.ended == ended:
                    await streams.change()
        except TimeoutError:
            why = "the kubelet accepted the registration but did not ask for the devices"
            raise CannotRegisterError(why) from None
        self.state = replace(self.state, registered=True, registrations=self.state.registrations + 1, error="")
        if self._short_lived < 2:
            self._say_registered()

    def _say_registered(self) -> None:
        log.info("resource registered", resource=self.resource, registrations=self.state.registrations)

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
