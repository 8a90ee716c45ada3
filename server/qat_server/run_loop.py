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
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from qat_server import logs
from qat_server.binding import plan as reconcile
from qat_server.binding.binder import Binder
from qat_server.command_line.settings import Registration, Settings
from qat_server.devices.discovery import discover
from qat_server.devices.health import HealthMonitor
from qat_server.devices.inventory import Inventory, Listing
from qat_server.devices.resource_names import Services
from qat_server.devices.uevents import Again, Changes, UeventListener, resync
from qat_server.helper_client.client import HelperClient
from qat_server.instrumentation.conditions import Facts
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet import listing
from qat_server.kubelet import sockets as grpc_socket
from qat_server.kubelet.endpoint_directory import DirectoryGoneError, EndpointDirectory
from qat_server.kubelet.endpoints import Endpoints
from qat_server.kubelet.pod_resources import Answer, held_devices
from qat_server.kubelet.usage import Usage
from qat_server.observability import readiness
from qat_server.observability.status import State
from qat_server.observability.status_server import Pages
from qat_server.provisioning.provisioner import Provisioner
from qat_server.provisioning.watch import ConfigurationWatch
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


class Plugin:
    """One server. `run` until cancelled; `state` at any time. `sockets` listen for who asks after it.

    `on_look` is called after each look at the devices.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: Sequence[socket.socket] = (),
        sandbox_state: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_look: Callable[[], None] = lambda: None
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
        self.binder = Binder(
            self.helper, settings.dpdk_driver, self.counters, self.changes.mark, settings.sysfs_root, clock
        )
        self.services = Services(self.helper, self.changes.mark_known, clock)
        self.provisioner = Provisioner(
            self.helper, settings.sysfs_root, self.usage, self.changes.mark_or_judge, settings.drain, clock
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
        self.endpoints = Endpoints(settings, self.helper, self.directory, self.usage, self.counters, clock)
        self.look_error = "starting"
        self._pages = Pages(
            settings.sysfs_root, lambda: self.inventory, self.state, lambda: readiness.not_ready(self), clock
        )
        self._facts = Facts()
        self._again = Again(self.changes)
        self._clock = clock

    def state(self, inventory: Inventory) -> State:
        """What is known at this moment, for /status and /metrics; `inventory` as FreshUse gives it."""
        return State(
            inventory=inventory,
            listing=self.listing,
            names=self.names,
            unhealthy=self.health.unhealthy(),
            heartbeats=self.health.alive,
            endpoints=self.endpoints.states,
            helper=self.helper.state,
            sandbox=self._sandbox,
            foreign=self.foreign,
            failures=self.binder.failures,
            held=self.usage.by_device(),
            provisioning=self.provisioner.progress,
            provisioning_error=self.configuration.error if self.configuration else "",
            not_ready=readiness.not_ready(self),
            uevents=self.listener.received,
            uevent_overruns=self.listener.overruns,
        )

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
                tasks.create_task(self._pages.serve(self._sockets, self.counters))
            tasks.create_task(self.helper.run())
            with contextlib.suppress(TimeoutError):  # one that accepts and says nothing
                async with asyncio.timeout(HELPER_PATIENCE):
                    await self.helper.tried.wait()
            while True:
                await self.directory.prepare()
                async with self.directory.held():
                    grpc_socket.remove_leftovers(self.settings.socket_directory)
                    await self._work()

    async def _work(self) -> None:
        """Serve in the directory; return when it has gone."""
        self.look_error = "the first look at the devices is not done"
        self.changes.mark()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.directory.until_gone())
                tasks.create_task(self._pages.serve_status(self.settings.socket_directory))
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
            self.endpoints.forget()
            self.look_error = "the socket directory has gone"

    async def _query_holders(self) -> Answer:
        return await held_devices(self.helper, self.settings.socket_directory, wait_ms=_KUBELET_WAIT_MS)

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
            self.on_look()
        except Exception as error:
            log.exception("the devices could not be looked at")
            self.look_error = f"a defect kept the devices from being looked at: {error!r}"
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
                self.look_error = str(error)
                self._facts.say("the PCI bus cannot be read", why=str(error))
                self._again.look([None])
                return
            self._again.look([problem.address for problem in self.inventory.problems])
        inventory = self.inventory
        self._facts.of_inventory(inventory, settings.max_num_devices)
        if self.configuration is not None:
            if changed is None:
                self.configuration.load()
            await self.provisioner.look(inventory, self.configuration.current, self._holders, work)
        if not inventory.vfs and not self.provisioner.working:
            self._facts.no_vfs(len(inventory.pfs), settings.kernel_vf_drivers)
        self.health.look()
        self.services.look(inventory, self._facts, work)
        self.names = self.services.names(inventory)
        plan = reconcile.plan(inventory, settings.dpdk_driver)
        self.foreign = dict(plan.foreign)
        for address, driver in plan.foreign:
            self._facts.say("VF left alone: somebody bound it to another driver", address=address, driver=driver)
        bind = self.provisioner.may_be_bound(inventory, (*plan.bind, *self.binder.late))
        self.binder.wanted(bind, work)
        self.listing = listing.advance(
            self.listing,
            inventory,
            self._offered(inventory),
            dict.fromkeys(self.binder.unsettled, "it is being bound")
            | self.health.unhealthy()
            | self.provisioner.withheld,
            settings.dpdk_driver,
            self.endpoints.releasable,
            self.endpoints.held,
            self.usage.holders,
        )
        self.usage.observe(self.listing)
        if not self.usage.asked:  # the first list must have what pods hold, even if it has gone
            self.look_error = ""
            return  # the answer leads to a new look
        self.endpoints.publish(self.listing, work)
        self.provisioner.published()
        self.look_error = ""

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

    def _holders(self) -> dict[PciAddress, str] | None:
        return self.usage.holders_of(self.listing, self.endpoints.held)

    def _offered(self, inventory: Inventory) -> dict[PciAddress, str]:
        """The names, without VFs that are new and being bound, or whose PF has not shown yet that it is alive."""
        pending, unsettled = self.health.pending(), self.binder.unsettled
        if not pending and not unsettled:
            return self.names
        listed = {device.address for devices in self.listing.values() for device in devices}
        unknown = {vf.address for vf in inventory.vfs if vf.pf in pending or vf.address in unsettled} - listed
        return {address: name for address, name in self.names.items() if address not in unknown}
