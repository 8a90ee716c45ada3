"""The kubelet's device manager: decides which devices a container gets, and records them in the inventory.

Follows pkg/kubelet/cm/devicemanager/manager.go (v1.36) step by step, its faults included: an empty Allocate answer
leaks the devices, devices of ended pods are freed only at the next request, and a device that leaves the list at the
wrong moment is a nil dereference, here KubeletPanicError. A seeded shuffle stands for Go's random order of sets.
"""

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from qat_simulation.kubelet import topology
from qat_simulation.kubelet.device_inventory import DeviceInventory, PluginClient
from qat_simulation.kubelet.pods import (
    AdmissionError,
    ContainerDevices,
    KubeletPanicError,
    TopologyAffinityError,
)
from qat_simulation.kubelet.topology import Hint, TopologyPolicy

NO_NUMA: Final = -1


class DeviceManager(DeviceInventory):
    """The inventory, with allocation."""

    def __init__(
        self,
        policy: TopologyPolicy,
        numa_nodes: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
        seed: int = 0,
    ) -> None:
        super().__init__(clock)
        self._policy = policy
        self._numa_nodes = tuple(numa_nodes)
        self._random = random.Random(seed)  # noqa: S311 - not a secret

    async def allocate(self, pod: str, container: str, requests: Mapping[str, int]) -> None:
        """Compute the hint for one container, then allocate devices. Raises AdmissionError or KubeletPanicError.

        `requests` maps resources to numbers of devices.
        """
        self.collect()
        hint = self._affinity(pod, container, requests)
        for resource, wanted in requests.items():
            if resource not in self._healthy and resource not in self._allocated:
                continue  # not a plugin's resource: another part of the kubelet rejects it
            devices = await self._choose(pod, container, resource, wanted, hint)
            if not devices:
                continue
            try:
                answer = await self._client(resource).allocate(self._unsorted(devices))
            except AdmissionError:
                self._allocated = self._held()
                raise
            if not answer.container_responses:
                raise AdmissionError(f"no containers return in allocation response {answer}")
            by_numa: dict[int, list[str]] = {}
            for device in sorted(devices):
                for node in self._nodes(resource, device) or (NO_NUMA,):
                    by_numa.setdefault(node, []).append(device)
            held = ContainerDevices(by_numa, answer.container_responses[0].SerializeToString())
            self.pods.setdefault(pod, {}).setdefault(container, {})[resource] = held

    def _affinity(self, pod: str, container: str, requests: Mapping[str, int]) -> Hint:
        if self._policy is TopologyPolicy.NONE:
            return Hint(None, True)
        offered = [self._hints(pod, container, resource, wanted) for resource, wanted in requests.items()]
        hint, admitted = topology.merge(self._policy, offered, self._numa_nodes)
        if not admitted:
            raise TopologyAffinityError("Resources cannot be allocated with Topology locality")
        return hint

    def _hints(self, pod: str, container: str, resource: str, wanted: int) -> list[Hint] | None:
        if not self._aligned(resource):
            return None
        devices = {device: frozenset(self._nodes(resource, device)) for device in self._all[resource]}
        held = self._container(pod, container, resource)
        if held:
            if len(held) != wanted:
                return []
            for device in held:
                self._nodes(resource, device)  # the real kubelet crashes if a device is not listed any more
            return topology.hints(devices, held, wanted, self._numa_nodes)
        available = self._healthy[resource] - self._allocated.get(resource, set())
        if len(available) < wanted:
            return []
        return topology.hints(devices, available, wanted, self._numa_nodes)

    async def _choose(self, pod: str, container: str, resource: str, wanted: int, hint: Hint) -> set[str]:
        """devicesToAllocate: none if the container has its devices already."""
        held = self._container(pod, container, resource)
        if held and len(held) != wanted:
            raise AdmissionError(
                f'pod "{pod}" container "{container}" changed request for resource "{resource}"'
                f" from {len(held)} to {wanted}"
            )
        healthy = self._healthy.get(resource)
        if healthy is None:
            raise AdmissionError(f"cannot allocate unregistered device {resource}")
        if not healthy:
            raise AdmissionError(f"no healthy devices present; cannot allocate unhealthy devices {resource}")
        if not held <= healthy:
            raise AdmissionError(
                f"previously allocated devices are no longer healthy; cannot allocate unhealthy devices {resource}"
            )
        if held or not wanted:
            return set()
        available = healthy - self._allocated.get(resource, set())
        if len(available) < wanted:
            raise AdmissionError(
                f"requested number of devices unavailable for {resource}."
                f" Requested: {wanted}, Available: {len(available)}"
            )
        aligned, unaligned, without = self._by_affinity(resource, available, hint)
        selection = _Selection(wanted, self._allocated.setdefault(resource, set()), self._unsorted)
        if wanted < len(aligned):
            preferred = await self._preferred(resource, aligned, set(), wanted)
            # The set may have been replaced while the plugin was asked.
            selection.allocated = self._allocated.setdefault(resource, set())
            if selection.add(preferred & aligned) or selection.add(aligned):
                return selection.devices
        elif selection.add(aligned):
            return selection.devices
        else:
            # The other sets are from before the question, as in the real kubelet.
            preferred = await self._preferred(resource, available | selection.devices, set(selection.devices), wanted)
            selection.allocated = self._allocated.setdefault(resource, set())
            if selection.add(preferred & available) or selection.add(unaligned) or selection.add(without):
                return selection.devices
        raise AdmissionError(
            f"unexpectedly allocated less resources than required. Requested: {wanted}, Got: {len(selection.devices)}"
        )

    async def _preferred(self, resource: str, available: set[str], must_include: set[str], size: int) -> set[str]:
        client = self._client(resource)
        if not client.options.get_preferred_allocation_available:
            return set()
        try:
            return set(await client.preferred(self._unsorted(available), self._unsorted(must_include), size))
        except AdmissionError as error:
            raise AdmissionError(f"device plugin GetPreferredAllocation rpc failed with err: {error}") from error

    def _by_affinity(self, resource: str, available: set[str], hint: Hint) -> tuple[set[str], set[str], set[str]]:
        """filterByAffinity: the devices on the hinted NUMA nodes, on others, and on none."""
        if not self._aligned(resource) or hint.nodes is None:
            return set(), set(), available
        nodes = {device: frozenset(self._nodes(resource, device)) for device in available}
        aligned = {device for device in available if nodes[device] & hint.nodes}
        without = {device for device in available if not nodes[device]}
        return aligned, available - aligned - without, without

    def _client(self, resource: str) -> PluginClient:
        endpoint = self._endpoints.get(resource)
        if endpoint is None:
            raise AdmissionError(f"unknown Device Plugin {resource}")
        if endpoint.client is None or endpoint.stopped_at is not None:
            raise AdmissionError(f"endpoint {resource} has been stopped")
        return endpoint.client

    def _aligned(self, resource: str) -> bool:
        return any(device.topology.nodes for device in self._all.get(resource, {}).values())

    def _nodes(self, resource: str, device: str) -> list[int]:
        """Raises KubeletPanicError where the real kubelet dereferences nil; no other place does."""
        listed = self._all.get(resource, {}).get(device)
        if listed is None:
            raise KubeletPanicError(
                f"device {device} of {resource} left the list while it was allocated: nil dereference in the kubelet"
            )
        return [node.ID for node in listed.topology.nodes]

    def _container(self, pod: str, container: str, resource: str) -> set[str]:
        held = self.pods.get(pod, {}).get(container, {}).get(resource)
        return held.devices if held else set()

    def _unsorted(self, devices: Iterable[str]) -> list[str]:
        shuffled = sorted(devices)
        self._random.shuffle(shuffled)
        return shuffled


class _Selection:
    """allocateRemainingFrom: adds devices until there are enough, and marks them as allocated."""

    def __init__(self, wanted: int, allocated: set[str], order: Callable[[Iterable[str]], list[str]]) -> None:
        self.devices: set[str] = set()
        self.allocated = allocated
        self._wanted = wanted
        self._order = order

    def add(self, devices: set[str]) -> bool:
        """Add devices of this set; whether there are enough now."""
        for device in self._order(devices - self.devices):
            if len(self.devices) == self._wanted:
                break
            self.allocated.add(device)
            self.devices.add(device)
        return len(self.devices) == self._wanted
