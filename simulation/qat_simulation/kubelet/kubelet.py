"""An emulated kubelet: sockets, registration, device manager and pod resources, which behave as the real ones (v1.36).

Callers start, stop, kill and restart it, admit and free pods, and read capacity and allocatable. It runs in one event
loop, and `stop` ends all of it.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import grpc.aio

from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import add_RegistrationServicer_to_server
from qat_server.kubelet.generated.podresources_v1_pb2_grpc import add_PodResourcesListerServicer_to_server
from qat_server.kubelet.sockets import grpc_socket
from qat_server.kubelet.sockets.socket_files import BoundSocket
from qat_server.observability import unix_server
from qat_simulation.kubelet import checkpoint, grpc_services
from qat_simulation.kubelet.checkpoint import Checkpoint
from qat_simulation.kubelet.device_manager import DeviceManager
from qat_simulation.kubelet.plugin_watcher import PERIOD, PluginWatcher
from qat_simulation.kubelet.plugins import Hostility, Plugins, Registration
from qat_simulation.kubelet.pods import (
    AdmissionError,
    Allocation,
    ContainerAllocation,
    KubeletPanicError,
    TopologyAffinityError,
    container_settings,
)
from qat_simulation.kubelet.topology import TopologyPolicy

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


class Kubelet:
    """One kubelet with its directory (as /var/lib/kubelet).

    `watcher_period`: seconds between two reconciliations of plugins_registry.
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
        self._topology_policy = topology_policy
        self._numa_nodes = tuple(numa_nodes)
        self._clock = clock
        self._serves_pod_resources = pod_resources
        self._watcher_period = watcher_period
        self._watcher: PluginWatcher | None = None
        self._manager = DeviceManager(topology_policy, numa_nodes, clock)
        self._pods: dict[str, tuple[str, ...]] = {}
        self.plugins = Plugins(
            self.plugin_directory, lambda: self._manager, self._listed, self._changed, clock, dial_timeout
        )
        self._servers: list[tuple[grpc.aio.Server, BoundSocket]] = []
        self._raw: asyncio.Server | None = None
        self._admission = asyncio.Lock()
        self._change = asyncio.Event()

    @property
    def hostility(self) -> Hostility:
        """The way in which it is broken; may be set at any time."""
        return self.plugins.hostility

    @hostility.setter
    def hostility(self, hostility: Hostility) -> None:
        self.plugins.hostility = hostility

    @property
    def registrations(self) -> list[Registration]:
        """All registrations that were attempted, over all restarts."""
        return self.plugins.registrations

    @property
    def plugin_directory(self) -> Path:
        """Where plugins register and have their sockets."""
        return self.directory / "device-plugins"

    @property
    def registry_directory(self) -> Path:
        """Where the plugin watcher finds plugins' sockets."""
        return self.directory / "plugins_registry"

    @property
    def running(self) -> bool:
        """Whether it serves."""
        return bool(self._servers) or self._raw is not None

    @property
    def settled(self) -> bool:
        """Whether the plugin watcher has nothing to reconcile."""
        return self._watcher is None or self._watcher.settled

    # Start and stop
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
            self._raw = await unix_server.start(self._misbehave, path)
            return
        server = grpc.aio.server()
        add_RegistrationServicer_to_server(grpc_services.Registration(self.plugins.register), server)
        await self._serve(server, path)
        if self._serves_pod_resources:
            server = grpc.aio.server()
            service = grpc_services.PodResources(lambda: self._manager, lambda: self._pods)
            add_PodResourcesListerServicer_to_server(service, server)
            await self._serve(server, pod_resources / "kubelet.sock")
        self._watcher = PluginWatcher(self.registry_directory, self.plugins, self._clock, self._watcher_period)
        self._watcher.start()
        self._changed()

    async def stop(self, kill: bool = False) -> None:
        """Stop it. With `kill`, its sockets' files remain and refuse connections."""
        if self._raw is not None:
            self._raw.close()
            await self._raw.wait_closed()
            self._raw = None
            if not kill:
                os.unlink(self.plugin_directory / "kubelet.sock")
        if self._watcher is not None:
            await self._watcher.stop()
            self._watcher = None
        await self.plugins.end()
        servers, self._servers = self._servers, []
        for server, bound in servers:
            await server.stop(None)
            if not kill:
                bound.remove()
        await self.plugins.end()  # those of a Register call that was in progress: no connection outlives the process
        self._changed()

    async def restart(self, kill: bool = False) -> None:
        """Stop it and start it in the same directory; pods keep running."""
        await self.stop(kill)
        await self.start()

    # State
    def capacity(self) -> dict[str, int]:
        """Number of devices by resource (with its namespace), unhealthy ones included."""
        return self._manager.capacity()

    def allocatable(self) -> dict[str, int]:
        """Number of healthy devices by resource, allocated or not."""
        return self._manager.allocatable()

    def allocatable_free(self) -> dict[str, int]:
        """Number of healthy devices by resource that no pod holds."""
        return self._manager.free()

    def devices_of(self, pod: str) -> set[str]:
        """The devices that a pod's containers hold."""
        containers = self._manager.pods.get(_key(pod), {}) if _key(pod) in self._pods else {}
        return {device for held in containers.values() for each in held.values() for device in each.devices}

    async def wait_for(self, predicate: Callable[[], object], seconds: float = 60.0) -> None:
        """Return once `predicate()` is true; it is called after each change of state. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not predicate():
                self._change.clear()
                await self._change.wait()

    # Pods

    async def allocate(self, pod: str, requests: Sequence[tuple[str, str, int]]) -> Allocation:
        """Admit a pod ("name" or "namespace/name"): (container, resource, number) in order. Raises AdmissionError.

        Raises KubeletPanicError where the real kubelet would crash. A pod that is running already is admitted again,
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
        return Allocation({container: container_settings(held.get(container, {})) for container in by_container})

    def free(self, pod: str) -> None:
        """End a pod. Its devices are freed when the kubelet next reads the allocations, as in the real one."""
        self._pods.pop(_key(pod), None)
        self._manager.active.discard(_key(pod))
        self._changed()

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

    def _listed(self) -> None:
        self._write_checkpoint()
        self._changed()

    def _write_checkpoint(self) -> None:
        checkpoint.write(self.plugin_directory, Checkpoint(self._manager.resources(), self._manager.pods))

    def _read_checkpoint(self) -> None:
        saved = checkpoint.read(self.plugin_directory)
        self._manager.restore(saved.resources, saved.pods)
        self._manager.active = set(self._pods)

    def _changed(self) -> None:
        self._change.set()


def _key(pod: str) -> str:
    return pod if "/" in pod else f"default/{pod}"
