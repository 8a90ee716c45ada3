"""An emulated kubelet: its sockets, registration, device manager and pod resources, as the real one behaves (v1.36).

Start, stop, kill and restart it, admit and free pods, look at capacity and allocatable. All in one event loop; nothing
runs that `stop` does not end. What a device plugin can feel is ported from the kubelet's source (device_manager.py,
topology.py, plugin_client.py, plugin_watcher.py, kubelet_services.py), its traps included; the pods are only names.

The trap to know: clients are kept by resource name, and whoever's stream ends drops the *newest* client of that name.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

import grpc.aio
from msgspec import Struct

from qat_server import grpc_socket
from qat_server.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.generated.deviceplugin_v1beta1_pb2_grpc import add_RegistrationServicer_to_server
from qat_server.generated.podresources_v1_pb2_grpc import add_PodResourcesListerServicer_to_server
from qat_server.grpc_socket import BoundSocket
from qat_server.simulation import checkpoint, kubelet_services
from qat_server.simulation.checkpoint import Checkpoint
from qat_server.simulation.device_manager import (
    AdmissionError,
    DeviceManager,
    KubeletPanicError,
    TopologyAffinityError,
)
from qat_server.simulation.kubelet_services import RegisterRefusedError
from qat_server.simulation.plugin_client import DialError, PluginConnection
from qat_server.simulation.plugin_watcher import PERIOD, PluginRefusedError, PluginWatcher
from qat_server.simulation.pods import Allocation, ContainerAllocation, started_with
from qat_server.simulation.topology import TopologyPolicy

__all__ = [
    "AdmissionError",
    "Allocation",
    "ContainerAllocation",
    "Hostility",
    "Kubelet",
    "KubeletPanicError",
    "Registration",
    "TopologyAffinityError",
    "TopologyPolicy",
]

DIAL_TIMEOUT: Final = 10.0


class Hostility(StrEnum):
    """Ways for a kubelet to be broken. CLOSE and GARBAGE take effect when it starts, the others at once."""

    NONE = "none"
    HANG = "hang"  # Register is never answered
    REFUSE = "refuse"  # Register is refused as if of a wrong version
    NO_STREAM = "no-stream"  # registers, but never asks for the devices
    END_STREAM = "end-stream"  # registers, and ends each stream after the first list
    CLOSE = "close"  # closes each connection at once
    GARBAGE = "garbage"  # answers with what is no HTTP/2


class Registration(Struct, frozen=True):
    """A Register request, or a plugin that was found: `error` is "" if accepted, `at` by the kubelet's clock.

    `endpoint` as it was named; that of a plugin that was found is absolute.
    """

    resource: str
    endpoint: str
    version: str
    error: str
    at: float


class Kubelet:
    """One kubelet with its directory (as /var/lib/kubelet). `registrations` are all that were asked of it.

    `watcher_period`: seconds between two looks at plugins_registry.
    """

    def __init__(
        self,
        directory: Path,
        topology_policy: TopologyPolicy = TopologyPolicy.NONE,
        numa_nodes: Sequence[int] = (0, 1),
        clock: Callable[[], float] = time.monotonic,
        pod_resources: bool = True,
        dial_timeout: float = DIAL_TIMEOUT,
        watcher_period: float = PERIOD,
    ) -> None:
        self.directory = directory
        self.hostility = Hostility.NONE
        self.registrations: list[Registration] = []
        self._topology_policy = topology_policy
        self._numa_nodes = tuple(numa_nodes)
        self._clock = clock
        self._serves_pod_resources = pod_resources
        self._dial_timeout = dial_timeout
        self._watcher_period = watcher_period
        self._watcher: PluginWatcher | None = None
        self._manager = DeviceManager(topology_policy, numa_nodes, clock)
        self._pods: dict[str, tuple[str, ...]] = {}
        self._clients: dict[str, PluginConnection] = {}
        self._open: set[PluginConnection] = set()
        self._watching: set[asyncio.Task[None]] = set()
        self._servers: list[tuple[grpc.aio.Server, BoundSocket]] = []
        self._raw: asyncio.Server | None = None
        self._admission = asyncio.Lock()
        self._change = asyncio.Event()

    @property
    def plugin_directory(self) -> Path:
        """Where plugins register and have their sockets."""
        return self.directory / "device-plugins"

    @property
    def registry_directory(self) -> Path:
        """Where plugins have sockets to be found."""
        return self.directory / "plugins_registry"

    @property
    def running(self) -> bool:
        """Whether it serves."""
        return bool(self._servers) or self._raw is not None

    @property
    def settled(self) -> bool:
        """Whether the plugin watcher will change nothing by itself."""
        return self._watcher is None or self._watcher.settled

    # Its life

    async def start(self) -> None:
        """Read the checkpoint, clean the directory, serve."""
        pod_resources = self.directory / "pod-resources"
        for each in (self.plugin_directory, pod_resources):
            os.makedirs(each, mode=0o750, exist_ok=True)
        self._manager = DeviceManager(self._topology_policy, self._numa_nodes, self._clock)
        self._read_checkpoint()
        checkpoint.clean_up(self.plugin_directory)
        path = self.plugin_directory / "kubelet.sock"
        if self.hostility in (Hostility.CLOSE, Hostility.GARBAGE):
            self._raw = await asyncio.start_unix_server(self._misbehave, path)
            return
        server = grpc.aio.server()
        add_RegistrationServicer_to_server(kubelet_services.Registration(self._register), server)
        await self._serve(server, path)
        if self._serves_pod_resources:
            server = grpc.aio.server()
            service = kubelet_services.PodResources(lambda: self._manager, lambda: self._pods)
            add_PodResourcesListerServicer_to_server(service, server)
            await self._serve(server, pod_resources / "kubelet.sock")
        self._watcher = PluginWatcher(self.registry_directory, self, self._clock, self._watcher_period)
        self._watcher.start()
        self._changed()

    async def stop(self, kill: bool = False) -> None:
        """End it. Killed, it leaves its sockets' files behind, which refuse connections."""
        if self._raw is not None:
            self._raw.close()
            await self._raw.wait_closed()
            self._raw = None
            if not kill:
                os.unlink(self.plugin_directory / "kubelet.sock")
        if self._watcher is not None:
            await self._watcher.stop()
            self._watcher = None
        for connection in list(self._clients.values()):
            await self._disconnect(connection)
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for connection in list(self._open):  # those that a later registration displaced
            await self._close(connection)
        servers, self._servers = self._servers, []
        for server, bound in servers:
            await server.stop(None)
            if not kill:
                bound.remove()
        self._changed()

    async def restart(self, kill: bool = False) -> None:
        """A new life in the same directory; pods go on."""
        await self.stop(kill)
        await self.start()

    # What one sees of it

    def capacity(self) -> dict[str, int]:
        """Devices by resource (with its namespace), unhealthy ones included."""
        return self._manager.capacity()

    def allocatable(self) -> dict[str, int]:
        """Healthy devices by resource, in use or not."""
        return self._manager.allocatable()

    def allocatable_free(self) -> dict[str, int]:
        """Healthy devices by resource that no pod holds."""
        return self._manager.free()

    def devices_of(self, pod: str) -> set[str]:
        """The devices that a pod's containers hold."""
        containers = self._manager.pods.get(_key(pod), {}) if _key(pod) in self._pods else {}
        return {device for held in containers.values() for each in held.values() for device in each.devices}

    async def wait_for(self, predicate: Callable[[], object], seconds: float = 60.0) -> None:
        """Return once `predicate()` is true; it is asked at each change of the kubelet's state. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not predicate():
                self._change.clear()
                await self._change.wait()

    # Pods

    async def allocate(self, pod: str, requests: Sequence[tuple[str, str, int]]) -> Allocation:
        """Admit a pod ("name" or "namespace/name"): (container, resource, number) in order. Raises AdmissionError.

        KubeletPanicError says that the real kubelet would have crashed. A pod that is there already is admitted anew,
        as after a restart, and keeps its devices.
        """
        key = _key(pod)
        by_container: dict[str, dict[str, int]] = {}
        for container, resource, number in requests:
            by_container.setdefault(container, {})[resource] = number
        async with self._admission:
            self._pods[key] = tuple(by_container)
            self._manager.active.add(key)
            try:
                for container, wanted in by_container.items():
                    await self._manager.allocate(key, container, wanted)
            except (AdmissionError, KubeletPanicError) as error:
                self.free(pod)
                if isinstance(error, AdmissionError) and not isinstance(error, TopologyAffinityError):
                    raise AdmissionError(f"Allocate failed due to {error}, which is unexpected") from error
                raise
            self._write_checkpoint()
        self._changed()
        held = self._manager.pods.get(key, {})
        return Allocation({container: started_with(held.get(container, {})) for container in by_container})

    def free(self, pod: str) -> None:
        """The pod has ended. Its devices are freed when the kubelet next looks, as in the real one."""
        self._pods.pop(_key(pod), None)
        self._manager.active.discard(_key(pod))
        self._changed()

    # Plugins

    async def _register(self, request: pb.RegisterRequest) -> None:
        """The registration service. Raises RegisterRefusedError."""
        resource = request.resource_name
        with self._noting(resource, request.endpoint, request.version):
            [version] = self._as_heard([request.version])
            kubelet_services.check_request(version, resource)
            await self._perhaps_hang()
            # filepath.Join takes an absolute endpoint for a relative one too.
            await self._connect(resource, self.plugin_directory / request.endpoint.lstrip("/"))

    async def plugin_found(self, name: str, endpoint: str, versions: Sequence[str]) -> None:
        """The plugin watcher's handler: a relative endpoint is one of the kubelet's working directory."""
        try:
            with self._noting(name, endpoint, " ".join(versions)):
                kubelet_services.check_plugin(name, self._as_heard(versions))
                await self._perhaps_hang()
                try:
                    await self._connect(name, Path(endpoint))
                except DialError as failure:
                    raise RegisterRefusedError(f"plugin registration failed with err: {failure}") from failure
        except RegisterRefusedError as refused:
            raise PluginRefusedError(str(refused)) from refused

    async def plugin_gone(self, name: str) -> None:
        """The plugin watcher's handler: whose socket it was does not count, the newest client is dropped."""
        current = self._clients.get(name)
        if current is not None:
            await self._disconnect(current)

    def _as_heard(self, versions: Sequence[str]) -> Sequence[str]:
        return [f"not {version}" for version in versions] if self.hostility is Hostility.REFUSE else versions

    async def _perhaps_hang(self) -> None:
        if self.hostility is Hostility.HANG:
            await asyncio.Event().wait()

    @contextlib.contextmanager
    def _noting(self, resource: str, endpoint: str, version: str) -> Iterator[None]:
        def note(error: str) -> None:
            self.registrations.append(Registration(resource, endpoint, version, error, self._clock()))
            self._changed()

        if self.hostility is Hostility.HANG:
            note("hangs")
            yield
            return
        try:
            yield
        except (RegisterRefusedError, DialError) as failure:
            note(str(failure))
            raise RegisterRefusedError(str(failure)) from failure
        note("")

    async def _connect(self, resource: str, path: Path) -> None:
        """connectClient: the newest client of a name replaces the older one, which goes on unknown to it."""
        connection = PluginConnection(resource, path)
        self._open.add(connection)
        self._clients[connection.resource] = connection
        try:
            await connection.connect(self._dial_timeout)
        except BaseException:
            self._clients.pop(connection.resource, None)
            await self._close(connection)
            raise
        self._manager.connected(connection.resource, connection)
        if self.hostility is not Hostility.NO_STREAM:
            task = asyncio.create_task(self._watch(connection))
            self._watching.add(task)
            task.add_done_callback(self._watching.discard)

    async def _watch(self, connection: PluginConnection) -> None:
        """runClient: at the end of the stream the client that has this name *now* is dropped."""
        if self.hostility is Hostility.END_STREAM:
            await connection.open_and_end_stream()
        else:
            await connection.watch(lambda devices: self._listed(connection.resource, devices))
        current = self._clients.get(connection.resource)
        if current is not None:
            await self._disconnect(current)

    def _listed(self, resource: str, devices: Sequence[pb.Device]) -> None:
        self._manager.listed(resource, devices)
        self._write_checkpoint()
        self._changed()

    async def _disconnect(self, connection: PluginConnection) -> None:
        self._clients.pop(connection.resource, None)
        await self._close(connection)
        self._manager.disconnected(connection.resource)
        self._changed()

    async def _close(self, connection: PluginConnection) -> None:
        self._open.discard(connection)
        await connection.close()

    # Files and sockets

    async def _serve(self, server: grpc.aio.Server, path: Path) -> None:
        try:
            self._servers.append((server, await grpc_socket.start(server, path, 0o755)))
        except BaseException:
            await server.stop(None)
            raise

    async def _misbehave(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.hostility is Hostility.GARBAGE:
            writer.write(b"\x00\xff this is no HTTP/2 at all \r\n\r\n" * 16)
        writer.close()

    def _write_checkpoint(self) -> None:
        checkpoint.write(self.plugin_directory, Checkpoint(self._manager.resources(), self._manager.pods))

    def _read_checkpoint(self) -> None:
        kept = checkpoint.read(self.plugin_directory)
        self._manager.restore(kept.resources, kept.pods)
        self._manager.active = set(self._pods)

    def _changed(self) -> None:
        self._change.set()


def _key(pod: str) -> str:
    return pod if "/" in pod else f"default/{pod}"
