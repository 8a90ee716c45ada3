"""The endpoints that are served, one for each resource of the listing: made when it comes, withdrawn when it goes."""

import asyncio
import time
from collections.abc import Callable

from qat_server import logs
from qat_server.helper_client.client import HelperClient
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.allocation import AllocationPolicy
from qat_server.kubelet.device import Listing
from qat_server.kubelet.endpoint import Endpoint, EndpointState
from qat_server.kubelet.registration.directories import Registration
from qat_server.kubelet.registration.kubelet_socket import SocketRegistrar
from qat_server.kubelet.registration.plugin_watcher import WatcherRegistrar
from qat_server.kubelet.registration.registrar import Registrar
from qat_server.kubelet.sockets.endpoint_directory import EndpointDirectory
from qat_server.kubelet.usage import Usage
from qat_shared import NAMESPACE
from qat_shared.pci import PciAddress

log = logs.get(__name__)


class Endpoints:
    """All endpoints of one server. Nothing but `publish` and `forget` changes which there are."""

    def __init__(
        self,
        registration: Registration,
        policy: AllocationPolicy,
        helper: HelperClient,
        directory: EndpointDirectory,
        usage: Usage,
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
        """How each stands with the kubelet, by resource."""
        return {name: endpoint.state for name, endpoint in self._by_name.items()}

    def publish(self, listing: Listing, work: asyncio.TaskGroup) -> None:
        """Serve these resources with these devices and no others; new endpoints run in tasks of `work`."""
        for name, devices in listing.items():
            endpoint = self._by_name.get(name)
            if endpoint is None:
                endpoint = self._by_name[name] = self._made(name)
                endpoint.update(devices)
                log.info("resource served", resource=endpoint.resource, devices=len(devices))
                work.create_task(endpoint.run())
            else:
                endpoint.update(devices)
        for name in self._by_name.keys() - listing.keys():
            log.info("resource withdrawn", resource=f"{NAMESPACE}/{name}")
            work.create_task(self._by_name.pop(name).withdraw())

    def forget(self) -> None:
        """Their tasks have ended, with the directory that their sockets were in."""
        self._by_name.clear()

    def held(self, resource: str, address: PciAddress) -> bool:
        """Whether a pod has a device of a resource, or may, by what was handed out and what the kubelet says."""
        endpoint = self._by_name.get(resource)
        return self._usage.held(resource, address, endpoint.handed_out.get(address) if endpoint else None)

    def releasable(self, resource: str, address: PciAddress) -> bool:
        """Whether a device that is gone may leave the resource's list."""
        return self._usage.releasable(resource, address) and not self.held(resource, address)

    def _made(self, name: str) -> Endpoint:
        return Endpoint(
            name,
            self._registrar(name),
            self._policy,
            self._counters,
            self._usage,
            self._directory.missed,
            self._clock,
        )

    def _registrar(self, name: str) -> Registrar:
        if self._registration is Registration.PLUGIN_WATCHER:
            return WatcherRegistrar(name, self._directory.path)
        return SocketRegistrar(name, self._directory.path, self._helper)
