"""The server's run loop: the one place that holds state which changes, and the tasks that own it.

    uevents, resync, health, usage  →  Changes  →  look: discovery → provisioner → names → plan → listing  →  endpoints
                                                              │                  │
                                                              └──── helper ──────┴→ binder → helper → Changes

`_look` is the only function that replaces the inventory and the listing; all others ask for a look by `changes.mark`.
Everything runs in one task group: what fails beyond repair ends the process with its error, and the supervisor (the
kubelet, systemd) starts it again; what fails for one device stays with that device.
"""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import uvloop

from qat_server import grpc_socket, http_endpoint, listing, logs, reconcile, sandbox, status_socket
from qat_server.binder import Binder
from qat_server.counters import Counters
from qat_server.discovery import discover
from qat_server.endpoint import Endpoint
from qat_server.endpoint_directory import DirectoryGoneError, EndpointDirectory
from qat_server.events import Again, Changes, UeventListener, resync
from qat_server.facts import Facts
from qat_server.fresh_use import FreshUse
from qat_server.health import HealthMonitor
from qat_server.helper_client import HelperClient
from qat_server.http_endpoint import Response
from qat_server.inventory import Inventory, Listing
from qat_server.naming import NAMESPACE
from qat_server.pod_resources import Answer, held_devices
from qat_server.provisioning.provisioner import Provisioner
from qat_server.provisioning.watch import ConfigurationWatch
from qat_server.registration import Registrar
from qat_server.registration_socket import SocketRegistrar
from qat_server.registration_watcher import WatcherRegistrar
from qat_server.services import Services
from qat_server.settings import Registration, Settings
from qat_server.status import HelperState, State, encode, no_vfs_hint, status_from
from qat_server.usage import Usage
from qat_shared import VERSION
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError

log = logs.get(__name__)

HELPER_PATIENCE: Final = 2.0
"""Seconds that the start waits for the first attempt to reach the helper to end."""

WITHOUT_HELPER: Final = 5.0
"""Seconds that the first list waits for a helper, where the kubelet can be reached without one."""
_KUBELET_WAIT_MS: Final = 10_000  # that the helper waits for a kubelet that is to answer who holds what

_EMPTY: Final = Inventory(pfs=(), vfs=(), cut=(), problems=())


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT: the exit status."""
    failed: list[BaseException] = []
    try:
        # Opened before anything is done, so that an address in use is told at once, and none can be made later.
        address = settings.metrics_address
        sockets = [] if address is None else http_endpoint.listen(address)
        uvloop.run(_serve(Plugin(settings, sockets, sandbox.enter(settings))))
    except* OSError as group:
        failed = list(_leaves(group))
    for error in failed:
        log.error("cannot go on", why=str(error))
    return 1 if failed else 0


async def _serve(plugin: "Plugin") -> None:
    task = asyncio.ensure_future(plugin.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    log.info("ended")


def _leaves(group: BaseExceptionGroup[OSError]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


class Plugin:
    """One server. `run` until cancelled; `state` at any time. `sockets` listen for who asks after it."""

    def __init__(
        self,
        settings: Settings,
        sockets: Sequence[socket.socket] = (),
        sandbox_state: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._sockets = sockets
        self._sandbox = dict(sandbox_state or {})
        self.changes = Changes()
        self.counters = Counters()
        self.helper = HelperClient(settings.helper_socket, self.counters, self._helper_changed)
        self.directory = EndpointDirectory(
            self.helper, settings.registration, settings.socket_directory, settings.helper_socket.parent
        )
        self.listener = UeventListener(settings.uevents, self.changes)
        self.health = HealthMonitor(
            self.helper,
            lambda: self.provisioner.settled(self.inventory.pfs),
            settings.health_interval,
            self.changes.mark_known,
            clock,
        )
        self.usage = Usage(
            self._query_holders,
            self.changes.mark_known,
            settings.resync_interval,
            clock=clock,
            # The plugin watcher needs no helper, so that its absence must not keep the kubelet waiting for ever.
            without_helper=WITHOUT_HELPER if settings.registration is Registration.PLUGIN_WATCHER else None,
        )
        self.binder = Binder(self.helper, settings.dpdk_driver, self.counters, self.changes.mark, clock)
        self.services = Services(self.helper, self.changes.mark_known, clock)
        self.provisioner = Provisioner(
            self.helper,
            settings.sysfs_root,
            self.usage,
            self.changes.mark_or_judge,
            settings.drain,
            clock,
        )
        self.configuration: ConfigurationWatch | None = None
        if settings.provisioning_config is not None:
            self.configuration = ConfigurationWatch(
                settings.provisioning_config, settings.node_name, self._configuration_changed
            )
        self.inventory = _EMPTY
        self.listing: Listing = {}
        self.names: dict[PciAddress, str] = {}
        self.foreign: dict[PciAddress, str] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self._not_ready = "starting"
        self._fresh_use = FreshUse(settings.sysfs_root, clock)
        self._facts = Facts()
        self._again = Again(self.changes)
        self._clock = clock

    @property
    def socket_directory(self) -> Path:
        """Where the endpoints' sockets are."""
        return self.settings.socket_directory

    def state(self, inventory: Inventory) -> State:
        """What is known at this moment, for /status and /metrics; `inventory` as FreshUse gives it."""
        return State(
            inventory=inventory,
            listing=self.listing,
            names=self.names,
            unhealthy=self.health.unhealthy(),
            heartbeats=self.health.alive,
            endpoints={name: endpoint.state for name, endpoint in self.endpoints.items()},
            helper=HelperState(
                connected=self.helper.connected,
                version=self.helper.version,
                error=self.helper.error,
                audit_sequence=self.helper.audit.head.sequence if self.helper.audit.head else 0,
                audit_hash=self.helper.audit.head.hash if self.helper.audit.head else "",
                audit_broken=self.helper.audit.broken,
                sandbox=self.helper.sandbox,
            ),
            sandbox=self._sandbox,
            foreign=self.foreign,
            failures=self.binder.failures,
            held=self.usage.by_device(),
            provisioning=self.provisioner.progress,
            provisioning_error=self.configuration.error if self.configuration else "",
            not_ready=self.not_ready(),
            uevents=self.listener.received,
            uevent_overruns=self.listener.overruns,
        )

    def not_ready(self) -> tuple[str, ...]:
        """The reasons why the server does not do all of its work, none when it does."""
        reasons = [reason] if (reason := self.directory.waits_for or self._not_ready) else []
        if not self.usage.asked and not reasons:
            reasons.append(f"what pods hold is not known yet: {self.usage.error}")
        if not self.helper.connected:
            reasons.append(self.helper.error)
        if self.configuration is not None and self.configuration.current is None:
            reasons.append(f"no provisioning configuration: {self.configuration.error or 'not read yet'}")
        reasons += [f"PF {address} is being provisioned" for address in self.provisioner.working]
        reasons += [
            f"{NAMESPACE}/{name} is not registered with the kubelet: {endpoint.state.error or 'under way'}"
            for name, endpoint in self.endpoints.items()
            if not endpoint.state.registered
        ]
        return tuple(reasons)

    async def run(self) -> None:
        """Work until cancelled. Raises an ExceptionGroup of OSError for what no new attempt would mend."""
        log.info(
            "started",
            version=VERSION,
            sysfs_root=self.settings.sysfs_root,
            kubelet_dir=self.settings.kubelet_dir,
            dpdk_driver=self.settings.dpdk_driver,
            kernel_vf_drivers=self.settings.kernel_vf_drivers,
            allocation_policy=self.settings.allocation_policy,
        )
        async with asyncio.TaskGroup() as tasks:
            if self._sockets:
                tasks.create_task(http_endpoint.serve(self._sockets, self._handlers()))
            tasks.create_task(self.helper.run())
            with contextlib.suppress(TimeoutError):  # one that accepts and says nothing
                async with asyncio.timeout(HELPER_PATIENCE):
                    await self.helper.tried.wait()
            while True:
                await self.directory.prepare()
                async with self.directory.held():
                    grpc_socket.remove_leftovers(self.socket_directory)
                    await self._work()

    async def _work(self) -> None:
        """Serve in the directory; return when it has gone."""
        self._not_ready = "the first look at the devices is not done"
        self.changes.mark()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.directory.until_gone())
                tasks.create_task(self._serve_status())
                if self.configuration is not None:
                    tasks.create_task(self.configuration.run())
                tasks.create_task(self.listener.run())
                tasks.create_task(resync(self.changes, self.settings.resync_interval))
                tasks.create_task(self.usage.run())
                tasks.create_task(self.health.run())
                async with asyncio.TaskGroup() as work:
                    while True:
                        await self._look_safely(await self.changes.wait(), work)
        except* DirectoryGoneError:
            self.endpoints.clear()
            self._not_ready = "the socket directory has gone"

    def _handlers(self) -> dict[str, http_endpoint.Handler]:
        from qat_server import metrics  # noqa: PLC0415 - prometheus_client only where metrics are wanted

        scraped = self.inventory
        registry = metrics.registry(lambda: self.state(scraped), self.counters)

        async def answer() -> Response:
            nonlocal scraped
            scraped = await self._fresh_use.of(self.inventory)
            return Response(200, metrics.text(registry), metrics.CONTENT_TYPE)

        return {
            "/healthz": lambda: Response(200, b"ok\n"),
            "/readyz": self._readyz,
            "/metrics": answer,
            "/status": self._status,
        }

    async def _status(self) -> Response:
        inventory = await self._fresh_use.of(self.inventory)
        return Response(200, encode(status_from(self.state(inventory))), http_endpoint.JSON)

    async def _serve_status(self) -> None:
        """For `qat-plugin status`, whether or not there is a --metrics-address."""
        with status_socket.listening(self.socket_directory) as local:
            await http_endpoint.serve([local], {"/status": self._status})

    def _readyz(self) -> Response:
        reasons = self.not_ready()
        if not reasons:
            return Response(200, b"ok\n")
        return Response(503, "".join(f"{reason}\n" for reason in reasons).encode())

    async def _query_holders(self) -> Answer:
        return await held_devices(self.helper, self.socket_directory, wait_ms=_KUBELET_WAIT_MS)

    def _helper_changed(self) -> None:
        self.directory.helper_changed()
        if self.helper.connected:
            self.provisioner.helper_changed()
            self.changes.mark()  # what could not be bound or read meanwhile
            self.usage.ask()
            self.health.ask()

    def _configuration_changed(self) -> None:
        current = self.configuration.current if self.configuration else None
        interval = current.heartbeat_interval if current else None
        self.health.set_interval(self.settings.health_interval if interval is None else interval)
        self.changes.mark_known()

    async def _look_safely(self, changed: frozenset[PciAddress] | None, work: asyncio.TaskGroup) -> None:
        """A look; a defect in it must not end what is served already."""
        try:
            await self._look(changed, work)
        except Exception as error:
            log.exception("the devices could not be looked at")
            self._not_ready = f"a defect kept the devices from being looked at: {error!r}"
            await asyncio.sleep(1)
            self.changes.mark()
        finally:
            self._facts.settle()

    async def _look(self, changed: frozenset[PciAddress] | None, work: asyncio.TaskGroup) -> None:
        """See what there is, have done what is missing, tell the kubelet what it may have."""
        settings = self.settings
        if changed is None or changed:
            try:
                self.inventory = await self._discover(changed)
            except SysfsError as error:
                self._not_ready = str(error)
                self._facts.say("the PCI bus cannot be read", why=str(error))
                self._again.look([None])
                return
            self._again.look([problem.address for problem in self.inventory.problems])
        inventory = self.inventory
        self._tell(inventory)
        if self.configuration is not None:
            if changed is None:
                self.configuration.load()
            await self.provisioner.look(inventory, self.configuration.current, self._holders, work)
        if not inventory.vfs and not self.provisioner.working:
            self._facts.say(
                "no QAT VFs found",
                drivers=settings.kernel_vf_drivers,
                pfs=len(inventory.pfs),
                hint=no_vfs_hint(len(inventory.pfs)),
            )
        self.health.look()
        self.services.look(inventory, self._facts, work)
        self.names = self.services.names(inventory)
        plan = reconcile.plan(inventory, settings.dpdk_driver)
        self.foreign = dict(plan.foreign)
        for address, driver in plan.foreign:
            self._facts.say("VF left alone: somebody bound it to another driver", address=address, driver=driver)
        self.binder.wanted(self.provisioner.may_be_bound(inventory, plan.bind), work)
        self.listing = listing.advance(
            self.listing,
            inventory,
            self._offered(inventory),
            self.health.unhealthy() | self.provisioner.withheld,
            settings.dpdk_driver,
            self._releasable,
            self._held,
            self.usage.holders,
        )
        self.usage.observe(self.listing)
        if not self.usage.asked:  # the first list must have what pods hold, even if it has gone
            self._not_ready = ""
            return  # the answer leads to a new look
        self._publish(work)
        self.provisioner.published()
        self._not_ready = ""

    async def _discover(self, changed: frozenset[PciAddress] | None) -> Inventory:
        """Raises SysfsError."""
        began = self._clock()
        self.binder.discovery_begins()
        known = None if self.inventory is _EMPTY else self.inventory
        settings = self.settings
        inventory = await asyncio.to_thread(
            discover, settings.sysfs_root, settings.kernel_vf_drivers, settings.max_num_devices, known, changed
        )
        if changed is None:
            self.counters.resync()
        self.counters.rescan(self._clock() - began)
        return inventory

    def _held(self, resource: str, address: PciAddress) -> bool:
        endpoint = self.endpoints.get(resource)
        return self.usage.held(resource, address, endpoint.handed_out.get(address) if endpoint else None)

    def _holders(self) -> dict[PciAddress, str] | None:
        return self.usage.holders_of(self.listing, self._held)

    def _offered(self, inventory: Inventory) -> dict[PciAddress, str]:
        """The names, without VFs that are new and whose PF has not shown yet that it is alive."""
        pending = self.health.pending()
        if not pending:
            return self.names
        listed = {device.address for devices in self.listing.values() for device in devices}
        unknown = {vf.address for vf in inventory.vfs if vf.pf in pending} - listed
        return {address: name for address, name in self.names.items() if address not in unknown}

    def _releasable(self, resource: str, address: PciAddress) -> bool:
        return self.usage.releasable(resource, address) and not self._held(resource, address)

    def _tell(self, inventory: Inventory) -> None:
        for problem in inventory.problems:
            self._facts.say("device not usable", address=problem.address, why=problem.text)
        if inventory.cut:
            self._facts.say(
                "more VFs than --max-num-devices: the last in address order are left alone",
                max_num_devices=self.settings.max_num_devices,
                left=len(inventory.cut),
                first=inventory.cut[0],
                last=inventory.cut[-1],
            )

    def _publish(self, work: asyncio.TaskGroup) -> None:
        for name, devices in self.listing.items():
            endpoint = self.endpoints.get(name)
            if endpoint is None:
                endpoint = self.endpoints[name] = self._endpoint(name)
                endpoint.update(devices)
                log.info("resource served", resource=f"{NAMESPACE}/{name}", devices=len(devices))
                work.create_task(endpoint.run())
            else:
                endpoint.update(devices)
        for name in self.endpoints.keys() - self.listing.keys():
            log.info("resource withdrawn", resource=f"{NAMESPACE}/{name}")
            work.create_task(self.endpoints.pop(name).withdraw())

    def _endpoint(self, name: str) -> Endpoint:
        return Endpoint(
            name,
            self._registrar(name),
            self.settings.allocation_policy,
            self.counters,
            self.usage.allocated,
            self._clock,
            on_watched=self.usage.watched,
            on_lost=self.directory.missed,
            in_use=self.usage.in_use,
        )

    def _registrar(self, name: str) -> Registrar:
        if self.settings.registration is Registration.PLUGIN_WATCHER:
            return WatcherRegistrar(name, self.socket_directory)
        return SocketRegistrar(name, self.socket_directory, self.helper)
