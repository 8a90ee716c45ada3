"""The emulated kubelet's device plugins: registrations of both kinds, and one client for each resource name.

Follows pkg/kubelet/cm/devicemanager/plugin/v1beta1/{server,handler}.go (v1.36). One oddity matters: clients are kept by
resource name, and the end of any plugin's stream drops the *newest* client of that name.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path

from msgspec import Struct

from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_simulation.kubelet import grpc_services
from qat_simulation.kubelet.device_manager import DeviceManager
from qat_simulation.kubelet.grpc_services import RegisterRefusedError
from qat_simulation.kubelet.plugin_client import DialError, PluginConnection
from qat_simulation.kubelet.plugin_watcher import PluginRefusedError


class Hostility(StrEnum):
    """Ways in which a kubelet is broken. CLOSE and GARBAGE take effect when it starts, the others at once."""

    NONE = "none"
    HANG = "hang"  # Register is never answered
    REFUSE = "refuse"  # Register is refused as if of a wrong version
    NO_STREAM = "no-stream"  # registers the plugin, but never calls ListAndWatch
    END_STREAM = "end-stream"  # registers the plugin, and ends each stream after the first list
    CLOSE = "close"  # closes each connection at once
    GARBAGE = "garbage"  # answers with bytes that are not HTTP/2


class Registration(Struct, frozen=True):
    """A Register request, or a plugin found by the watcher. `error` is "" if accepted; `at` is the kubelet's clock.

    `endpoint` is as the plugin named it; that of a plugin found by the watcher is absolute.
    """

    resource: str
    endpoint: str
    version: str
    error: str
    at: float


class Plugins:
    """The plugins of one kubelet over all its restarts. Relative endpoints are in `directory`.

    `manager` returns the device manager since the last start. `on_listed` is called after each list of devices that it
    got, `on_change` after every other visible change. `registrations` are all that were attempted.
    """

    def __init__(
        self,
        directory: Path,
        manager: Callable[[], DeviceManager],
        on_listed: Callable[[], None],
        on_change: Callable[[], None],
        clock: Callable[[], float],
        dial_timeout: float,
    ) -> None:
        self.hostility = Hostility.NONE
        self.registrations: list[Registration] = []
        self._directory = directory
        self._manager = manager
        self._on_listed = on_listed
        self._on_change = on_change
        self._clock = clock
        self._dial_timeout = dial_timeout
        self._clients: dict[str, PluginConnection] = {}
        self._open: set[PluginConnection] = set()
        self._watching: set[asyncio.Task[None]] = set()

    async def register(self, request: pb.RegisterRequest) -> None:
        """The registration service. Raises RegisterRefusedError."""
        resource = request.resource_name
        with self._recorded(resource, request.endpoint, request.version):
            [version] = self._altered([request.version])
            grpc_services.check_request(version, resource)
            await self._hang_if_hostile()
            # filepath.Join treats an absolute endpoint as a relative one too.
            await self._connect(resource, self._directory / request.endpoint.lstrip("/"))

    async def plugin_found(self, name: str, endpoint: str, versions: Sequence[str]) -> None:
        """The plugin watcher's handler: a relative endpoint is relative to the kubelet's working directory."""
        try:
            with self._recorded(name, endpoint, " ".join(versions)):
                grpc_services.check_plugin(name, self._altered(versions))
                await self._hang_if_hostile()
                try:
                    await self._connect(name, Path(endpoint))
                except DialError as failure:
                    raise RegisterRefusedError(f"plugin registration failed with err: {failure}") from failure
        except RegisterRefusedError as refused:
            raise PluginRefusedError(str(refused)) from refused

    async def plugin_gone(self, name: str) -> None:
        """The plugin watcher's handler: the newest client is dropped, whichever plugin had the socket."""
        current = self._clients.get(name)
        if current is not None:
            await self._disconnect(current)

    async def end(self) -> None:
        """Disconnect from all plugins, when the kubelet stops."""
        for connection in list(self._clients.values()):
            await self._disconnect(connection)
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for connection in list(self._open):  # the ones that a later registration replaced
            await self._close(connection)

    def _altered(self, versions: Sequence[str]) -> Sequence[str]:
        return [f"not {version}" for version in versions] if self.hostility is Hostility.REFUSE else versions

    async def _hang_if_hostile(self) -> None:
        if self.hostility is Hostility.HANG:
            await asyncio.Event().wait()

    @contextlib.contextmanager
    def _recorded(self, resource: str, endpoint: str, version: str) -> Iterator[None]:
        def record(error: str) -> None:
            self.registrations.append(Registration(resource, endpoint, version, error, self._clock()))
            self._on_change()

        if self.hostility is Hostility.HANG:
            record("hangs")
            yield
            return
        try:
            yield
        except (RegisterRefusedError, DialError) as failure:
            record(str(failure))
            raise RegisterRefusedError(str(failure)) from failure
        record("")

    async def _connect(self, resource: str, path: Path) -> None:
        """connectClient: the newest client of a name replaces the older one, whose stream continues."""
        connection = PluginConnection(resource, path)
        self._open.add(connection)
        self._clients[connection.resource] = connection
        try:
            await connection.connect(self._dial_timeout)
        except BaseException:
            self._clients.pop(connection.resource, None)
            await self._close(connection)
            raise
        self._manager().connected(connection.resource, connection)
        if self.hostility is not Hostility.NO_STREAM:
            task = asyncio.create_task(self._watch(connection))
            self._watching.add(task)
            task.add_done_callback(self._watching.discard)

    async def _watch(self, connection: PluginConnection) -> None:
        """runClient: when the stream ends, the client that has this name *now* is dropped."""
        if self.hostility is Hostility.END_STREAM:
            await connection.open_and_end_stream()
        else:
            await connection.watch(lambda devices: self._listed(connection.resource, devices))
        current = self._clients.get(connection.resource)
        if current is not None:
            await self._disconnect(current)

    def _listed(self, resource: str, devices: Sequence[pb.Device]) -> None:
        self._manager().listed(resource, devices)
        self._on_listed()

    async def _disconnect(self, connection: PluginConnection) -> None:
        self._clients.pop(connection.resource, None)
        await self._close(connection)
        self._manager().disconnected(connection.resource)
        self._on_change()

    async def _close(self, connection: PluginConnection) -> None:
        self._open.discard(connection)
        await connection.close()
