"""The composition root: makes every part of a server from its Settings, and wires their notifications.

Only this module, main, the process and the command line know Settings; each part is given the values that it needs.
"""

import functools
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from qat_server.binding.binder import Binder
from qat_server.command_line.settings import Settings
from qat_server.devices.change_queue import ChangeQueue
from qat_server.devices.dev_cfg import DevCfgReader
from qat_server.devices.health import HealthMonitor
from qat_server.devices.inventory import Inventory
from qat_server.devices.inventory_cache import InventoryCache
from qat_server.devices.open_vfs import OpenVfs
from qat_server.devices.pci_bus import pf_driver_of, pfs_without_driver
from qat_server.devices.uevents import UeventListener
from qat_server.helper_client.client import HelperClient
from qat_server.instrumentation.conditions import Conditions
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.endpoints import Endpoints
from qat_server.kubelet.pod_resources import held_devices
from qat_server.kubelet.registration.directories import Registration
from qat_server.kubelet.sockets.endpoint_directory import EndpointDirectory
from qat_server.kubelet.usage import DeviceUsage
from qat_server.observability import readiness
from qat_server.observability.handlers import HttpHandlers
from qat_server.observability.state import State
from qat_server.provisioning.provisioner import Provisioner
from qat_server.provisioning.watch import ConfigurationWatch
from qat_server.reconciler import Reconciler
from qat_server.run_loop import RunLoop, TaskFunction

_FIRST_LISTING_HELPER_WAIT: Final = 5.0
"""Seconds that the first list waits for a helper, where the kubelet can be reached without one."""
_KUBELET_WAIT_MS: Final = 10_000  # that the helper waits for the kubelet before it reports that there is none


class Server:
    """One server: `run_loop` serves, `state` and `unfinished` report."""

    def __init__(
        self,
        settings: Settings,
        sandbox: Mapping[str, str] | None = None,
        metrics_sockets: Sequence[socket.socket] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sandbox`: missing part of each layer. `metrics_sockets` listen already."""
        watcher = settings.registration is Registration.PLUGIN_WATCHER
        self.settings = settings
        self._sandbox = sandbox or {}
        self.counters = Counters()
        self.queue = ChangeQueue()
        conditions = Conditions()
        self.helper = HelperClient(settings.helper_socket, self.counters)
        # Devices and binding.
        self.uevents = UeventListener(settings.uevents, self.queue)
        self.inventory = InventoryCache(
            settings.sysfs_root,
            settings.kernel_vf_drivers,
            settings.max_num_devices,
            self.queue,
            conditions,
            self.counters,
            clock,
        )
        self.dev_cfgs = DevCfgReader(self.helper, self.queue.reconcile, clock)
        self.health = HealthMonitor(
            self.helper,
            lambda: self.provisioner.settled(self.inventory.current.pfs),  # made below
            settings.health_interval,
            self.queue.reconcile,
            clock,
        )
        self.binder = Binder(
            self.helper, settings.dpdk_driver, self.counters, self.queue.rescan, settings.sysfs_root, clock
        )
        # The kubelet.
        self.directory = EndpointDirectory(
            self.helper,
            settings.registration.socket_directory,
            settings.socket_directory,
            settings.helper_socket.parent,
        )
        self.usage = DeviceUsage(
            functools.partial(held_devices, self.helper, settings.socket_directory, wait_ms=_KUBELET_WAIT_MS),
            self.queue.reconcile,
            settings.resync_interval,
            clock=clock,
            # The plugin watcher needs no helper, so an absent one must not keep the kubelet waiting for ever.
            helper_timeout=_FIRST_LISTING_HELPER_WAIT if watcher else None,
        )
        self.endpoints = Endpoints(
            settings.registration,
            settings.allocation_policy,
            self.helper,
            self.directory,
            self.usage,
            self.counters,
            clock,
        )
        # Provisioning.
        self.provisioner = Provisioner(
            self.helper,
            settings.sysfs_root,
            self.usage,
            self.queue.rescan_or_reconcile,
            settings.drain,
            clock,
        )
        self.configuration: ConfigurationWatch | None = None
        if settings.provisioning_config is not None:
            self.configuration = ConfigurationWatch(
                settings.provisioning_config, settings.node_name, self._configuration_changed
            )
        self.reconciler = Reconciler(
            inventory=self.inventory,
            configuration=self.configuration,
            provisioner=self.provisioner,
            health=self.health,
            dev_cfgs=self.dev_cfgs,
            binder=self.binder,
            usage=self.usage,
            endpoints=self.endpoints,
            queue=self.queue,
            conditions=conditions,
            driver=settings.dpdk_driver,
        )
        status = HttpHandlers(
            lambda: self.inventory.current,
            self.state,
            OpenVfs(settings.sysfs_root, clock),
            self.counters,
            status_http=settings.status_http,
        )
        background: list[TaskFunction] = [self.helper.run]
        if metrics_sockets:
            background.append(functools.partial(status.serve, metrics_sockets))
        serving: list[TaskFunction] = [
            functools.partial(status.serve_locally, settings.socket_directory),
            self.uevents.run,
            functools.partial(self.queue.resync, settings.resync_interval),
            self.usage.run,
            self.health.run,
        ]
        if self.configuration is not None:
            serving.append(self.configuration.run)
        self.run_loop = RunLoop(
            self.helper, self.directory, self.endpoints, self.queue, self.reconciler, background, serving
        )
        # Notifications: when the helper connects or disconnects, and when it has connected.
        self.helper.on_change += [self.directory.helper_changed]
        self.helper.on_connected += [
            self.provisioner.helper_changed,
            self.queue.rescan,  # devices that could not be bound or read without the helper
            self.usage.refresh,
            self.health.query_all,
        ]

    def state(self, inventory: Inventory | None = None) -> State:
        """The State of this moment; `inventory` replaces the newest, where VFs' use was read again."""
        configuration = self.configuration
        return State(
            inventory=inventory or self.inventory.current,
            waits_for=self.directory.waits_for or self.reconciler.error,
            listing=self.reconciler.listing,
            names=self.reconciler.names,
            unhealthy=self.health.unhealthy(),
            heartbeats=self.health.heartbeats,
            endpoints=self.endpoints.states,
            helper=self.helper.state,
            foreign=self.reconciler.foreign,
            failures=self.binder.failures,
            held=self.usage.holder_names(),
            holders_unknown="" if self.usage.synced else self.usage.error,
            provisioning=self.provisioner.progress,
            working=self.provisioner.working,
            configured=configuration is None or configuration.current is not None,
            provisioning_error=configuration.error if configuration else "",
            uevents=self.uevents.received,
            uevent_overruns=self.uevents.overruns,
            sandbox=self._sandbox,
        )

    def unfinished(self) -> tuple[str, ...]:
        """The reasons why the start is not complete."""
        parts = (self.queue, self.provisioner, self.dev_cfgs, self.binder, self.health)
        reasons = readiness.unfinished(self.state(), parts)
        if not reasons and self.configuration is not None:  # last, since it reads the whole bus
            drivers = frozenset(map(pf_driver_of, self.settings.kernel_vf_drivers))
            waiting = pfs_without_driver(self.settings.sysfs_root, drivers)
            reasons = tuple(f"PF {address} has no driver" for address in waiting)
        return reasons

    def _configuration_changed(self) -> None:
        current = self.configuration.current if self.configuration else None
        interval = current.heartbeat_interval if current else None
        self.health.set_interval(self.settings.health_interval if interval is None else interval)
        self.queue.reconcile()
