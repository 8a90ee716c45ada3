"""The device manager's state: the devices that plugins have listed, which ones are healthy, and which pods hold some.

Follows pkg/kubelet/cm/devicemanager/manager.go (v1.36): the capacity of a resource outlives its plugin for a while, and
devices of ended pods are freed only when the allocations are next read.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_simulation.kubelet.pods import Pods

GRACE: Final = 300.0
"""Seconds that the capacity of a resource outlives its plugin (endpointStopGracePeriod)."""


class PluginClient(Protocol):
    """The connection to one device plugin. All methods raise AdmissionError with the RPC's error."""

    @property
    def options(self) -> pb.DevicePluginOptions:
        """The plugin's answer to GetDevicePluginOptions."""

    async def preferred(self, available: Sequence[str], must_include: Sequence[str], size: int) -> list[str]:
        """GetPreferredAllocation for one container."""

    async def allocate(self, devices: Sequence[str]) -> pb.AllocateResponse:
        """Allocate for one container."""


class _Endpoint:
    def __init__(self, client: PluginClient | None, stopped_at: float | None) -> None:
        self.client = client
        self.stopped_at = stopped_at


class DeviceInventory:
    """The state of one kubelet from start to stop. `active` are the pods that have not ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._endpoints: dict[str, _Endpoint] = {}
        self._all: dict[str, dict[str, pb.Device]] = {}
        self._healthy: dict[str, set[str]] = {}
        self._unhealthy: dict[str, set[str]] = {}
        self._allocated: dict[str, set[str]] = {}
        self.pods: Pods = {}
        self.active: set[str] = set()

    # Reports of the plugins' connections
    def connected(self, resource: str, client: PluginClient) -> None:
        """PluginConnected."""
        self._endpoints[resource] = _Endpoint(client, None)

    def disconnected(self, resource: str) -> None:
        """PluginDisconnected: healthy devices become unhealthy, and the grace period begins."""
        endpoint = self._endpoints.get(resource)
        if endpoint is None:
            return
        self._unhealthy.setdefault(resource, set()).update(self._healthy.get(resource, ()))
        if resource in self._healthy:
            self._healthy[resource] = set()
        endpoint.stopped_at = self._clock()

    def listed(self, resource: str, devices: Sequence[pb.Device]) -> None:
        """PluginListAndWatchReceiver."""
        self._all[resource] = {device.ID: device for device in devices}
        self._healthy[resource] = set()
        self._unhealthy[resource] = set()
        for device in devices:
            (self._healthy if device.health == "Healthy" else self._unhealthy)[resource].add(device.ID)

    def restore(self, resources: Iterable[str], pods: Pods) -> None:
        """readCheckpoint: all resources are stopped and have no devices until their plugins register."""
        self.pods = pods
        self.active = set(pods)
        self._allocated = self._held()
        for resource in resources:
            self._healthy[resource] = set()
            self._unhealthy[resource] = set()
            self._endpoints[resource] = _Endpoint(None, self._clock())

    # The node's status
    def capacity(self) -> dict[str, int]:
        """Number of devices by resource, unhealthy ones included."""
        self._forget_stopped()
        return {
            resource: len(devices) + len(self._unhealthy.get(resource, ()))
            for resource, devices in self._healthy.items()
        }

    def allocatable(self) -> dict[str, int]:
        """Number of healthy devices by resource, allocated ones included."""
        self._forget_stopped()
        return {resource: len(devices) for resource, devices in self._healthy.items()}

    def free(self) -> dict[str, int]:
        """Number of devices that new pods can get, by resource whose plugin has listed devices."""
        self.collect()
        return {
            resource: len(self._healthy.get(resource, set()) - self._allocated.get(resource, set()))
            for resource in self._all
        }

    def healthy_devices(self) -> dict[str, list[pb.Device]]:
        """GetAllocatableDevices."""
        return {
            resource: [self._all[resource][device] for device in sorted(devices)]
            for resource, devices in self._healthy.items()
        }

    def resources(self) -> list[str]:
        """The resources that the checkpoint names."""
        return sorted(self._healthy)

    def collect(self) -> None:
        """UpdateAllocatedDevices: free the devices of ended pods. If there are none, leaked devices stay allocated."""
        ended = self.pods.keys() - self.active
        if ended:
            for pod in ended:
                del self.pods[pod]
            self._allocated = self._held()

    def _held(self) -> dict[str, set[str]]:
        devices: dict[str, set[str]] = {}
        for containers in self.pods.values():
            for resources in containers.values():
                for resource, held in resources.items():
                    devices.setdefault(resource, set()).update(held.devices)
        return devices

    def _forget_stopped(self) -> None:
        for resource, endpoint in list(self._endpoints.items()):
            if endpoint.stopped_at is not None and self._clock() - endpoint.stopped_at > GRACE:
                del self._endpoints[resource]
                self._healthy.pop(resource, None)
                self._unhealthy.pop(resource, None)
