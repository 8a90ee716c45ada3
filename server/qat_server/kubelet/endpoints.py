"""The endpoints of one server, one for each resource of the listing: created and withdrawn as the listing changes."""

import asyncio
import time
from collections.abc import Callable

from qat_server import logs
from qat_server.helper_client.client import HelperClient
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.allocation import AllocationPolicy
from qat_server.kubelet.device import Listing
from qat_server.kubelet.endpoint import Endpoint, EndpointState
from qat_server.kubelet.pod_resources import Holders
from qat_server.kubelet.registration.directories import Registration
from qat_server.kubelet.registration.kubelet_socket import SocketRegistrar
from qat_server.kubelet.registration.plugin_watcher import WatcherRegistrar
from qat_server.kubelet.registration.registrar import Registrar
from qat_server.kubelet.sockets.endpoint_directory import EndpointDirectory
from qat_server.kubelet.usage import BEING_ADMITTED, DeviceUsage
from qat_shared import NAMESPACE
from qat_shared.pci import PciAddress

log = logs.get(__name__)


class Endpoints:
    """All endpoints of one server; only `publish` and `clear` add or remove any.

    It combines their allocations with `usage` and so implements `listing.PodDevices`.
    """

    def __init__(
        self,
        registration: Registration,
        policy: AllocationPolicy,
        helper: HelperClient,
        directory: EndpointDirectory,
        usage: DeviceUsage,
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registration = registration
        self._policy = policy
        self._helper = helper
        self._directory = directory
        self._usage = usage
        self._counters = counters
        self._clock = clock
        self._by_name: dict[str, Endpoint] = {}

    @property
    def states(self) -> dict[str, EndpointState]:
        """The state of each endpoint, by resource."""
        return {name: endpoint.state for name, endpoint in self._by_name.items()}

    def publish(self, listing: Listing, work: asyncio.TaskGroup) -> None:
        """Serve exactly the resources and devices of `listing`; endpoints run in tasks of `work`."""
        for name, devices in listing.items():
            endpoint = self._by_name.get(name)
            if endpoint is None:
                endpoint = self._by_name[name] = self._create(name)
                endpoint.update(devices)
                log.info("resource served", resource=endpoint.resource, devices=len(devices))
                work.create_task(endpoint.run())
            else:
                endpoint.update(devices)
        for name in self._by_name.keys() - listing.keys():
            log.info("resource withdrawn", resource=f"{NAMESPACE}/{name}")
            work.create_task(self._by_name.pop(name).withdraw())

    def clear(self) -> None:
        """Forget all endpoints, whose tasks have ended because their socket directory was removed."""
        self._by_name.clear()

    @property
    def holders(self) -> Holders | None:
        """The devices that pods are known to hold, None while the kubelet does not report them."""
        return self._usage.holders

    def may_be_held(self, resource: str, address: PciAddress) -> bool:
        """Whether a pod holds a device of a resource, or may, according to PodResources and our own allocations."""
        endpoint = self._by_name.get(resource)
        return self._usage.may_be_held(resource, address, endpoint.allocated_at.get(address) if endpoint else None)

    def releasable(self, resource: str, address: PciAddress) -> bool:
        """Whether an unhealthy device may leave the resource's list; `next_listing` asks and obeys."""
        return self._usage.confirmed_free(resource, address) and not self.may_be_held(resource, address)

    def holder_names(self, listing: Listing) -> dict[PciAddress, str] | None:
        """The devices that pods hold or may hold, each with its holder; None while the kubelet does not report them.

        A device of `listing` that was allocated a moment ago has BEING_ADMITTED as its holder.
        """
        if self.holders is None:
            return None
        possible = {
            device.address: BEING_ADMITTED
            for name, devices in listing.items()
            for device in devices
            if self.may_be_held(name, device.address)
        }
        return possible | self._usage.holder_names()

    def _create(self, name: str) -> Endpoint:
        return Endpoint(
            name,
            self._registrar(name),
            self._policy,
            self._counters,
            self._usage,
            self._directory.report_missing,
            self._clock,
        )

    def _registrar(self, name: str) -> Registrar:
        if self._registration is Registration.PLUGIN_WATCHER:
            return WatcherRegistrar(name, self._directory.path)
        return SocketRegistrar(name, self._directory.path, self._helper)
