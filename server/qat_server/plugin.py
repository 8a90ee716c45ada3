"""The server's run loop: the one place that holds state which changes, and the tasks that own it.

    uevents, resync, health, usage  →  Changes  →  look: discovery → names → plan → listing  →  endpoints
                                                            │
                                                            └→ binder → helper → Changes

`_look` is the only function that replaces the inventory and the listing; all others ask for a look by `changes.mark`.
Everything runs in one task group: what fails beyond repair ends the process with its error, and the supervisor (the
kubelet, systemd) starts it again; what fails for one device stays with that device.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qat_server import listing, naming, reconcile
from qat_server.binder import Binder
from qat_server.discovery import discover
from qat_server.endpoint import Endpoint
from qat_server.events import Changes, UeventListener, resync
from qat_server.health import HealthMonitor
from qat_server.helper_client import HelperClient, HelperError, HelperUnavailableError
from qat_server.inventory import Inventory, Listing
from qat_server.lock import only_server
from qat_server.pod_resources import held_devices
from qat_server.settings import Settings
from qat_server.usage import Usage
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError

log = logging.getLogger(__name__)

NAMESPACE: Final = "qat.intel.com"
_EMPTY: Final = Inventory(pfs=(), vfs=(), cut=(), problems=())


class Plugin:
    """One server. `run` until cancelled; `state` at any time."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.started_at = clock()
        self._clock = clock
        self.changes = Changes()
        self.helper = HelperClient(settings.helper_socket, self._helper_changed)
        self.listener = UeventListener(settings.uevents, self.changes)
        self.health = HealthMonitor(
            self.helper, lambda: self.inventory.pfs, settings.health_interval, self.changes.mark
        )
        self.usage = Usage(
            lambda: held_devices(self.helper, self.socket_directory), self.changes.mark, settings.resync_interval
        )
        self.binder = Binder(self.helper, settings.dpdk_driver, self.changes.mark, clock)
        self.inventory = _EMPTY
        self.listing: Listing = {}
        self.names: dict[PciAddress, str] = {}
        self.foreign: dict[PciAddress, str] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self.not_ready = "starting"
        self._configs: dict[PciAddress, str] = {}
        self._said: set[str] = set()
        self._helper_event = asyncio.Event()

    @property
    def socket_directory(self) -> Path:
        """Where the endpoints' sockets are."""
        return self.settings.kubelet_dir / "device-plugins" / NAMESPACE

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.helper.run())
            await self._prepare_socket_directory()
            async with only_server(self.socket_directory):
                self.not_ready = "the first look at the devices is not done"
                self.changes.mark()
                tasks.create_task(self.listener.run())
                tasks.create_task(resync(self.changes, self.settings.resync_interval))
                tasks.create_task(self.usage.run())
                if self.settings.health_interval:
                    tasks.create_task(self.health.run())
                async with asyncio.TaskGroup() as work:
                    while True:
                        await self._look(await self.changes.wait(), work)

    async def _prepare_socket_directory(self) -> None:
        """Have the helper make the directory; without a helper, go on as soon as it is there and can be written."""
        while True:
            self._helper_event.clear()
            try:
                await self.helper.prepare_socket_directory()
            except HelperUnavailableError as error:
                if _writable(self.socket_directory):
                    return
                self.not_ready = f"waiting for the helper to prepare {self.socket_directory}: {error.message}"
                await self._helper_event.wait()
            except HelperError as error:
                self.not_ready = f"the helper could not prepare {self.socket_directory}: {error.message}"
                log.error("socket directory not prepared", extra={"fields": {"why": error.message}})
                await asyncio.sleep(1)
            else:
                return

    def _helper_changed(self) -> None:
        self._helper_event.set()
        self.changes.mark()  # what could not be bound or read meanwhile

    async def _look(self, changed: frozenset[PciAddress] | None, work: asyncio.TaskGroup) -> None:
        settings = self.settings
        previous = self.inventory
        try:
            inventory = await asyncio.to_thread(
                discover, settings.sysfs_root, settings.kernel_vf_drivers, settings.max_num_devices, previous, changed
            )
        except SysfsError as error:
            self._say_once(f"bus:{error}", "the PCI bus cannot be read", why=str(error))
            self.not_ready = str(error)
            return
        self.inventory = inventory
        self._tell_changes(previous, inventory)
        await self._read_configs(inventory, work)
        pfs = {pf.address: pf for pf in inventory.pfs}
        self.names = {
            vf.address: naming.resource_name(
                vf, pfs.get(vf.pf) if vf.pf else None, self._configs.get(vf.pf) if vf.pf else None
            )
            for vf in inventory.vfs
        }
        plan = reconcile.plan(inventory, settings.dpdk_driver)
        self.foreign = dict(plan.foreign)
        for address, driver in plan.foreign:
            self._say_once(
                f"foreign:{address}:{driver}",
                "VF left alone: somebody bound it to another driver",
                address=address,
                driver=driver,
            )
        self.binder.wanted(plan.bind, work)
        self.listing = listing.advance(
            self.listing, inventory, self.names, self.health.unhealthy(), settings.dpdk_driver, self.usage.releasable
        )
        self.usage.observe(self.listing)
        self._publish(work)
        self.not_ready = ""

    def _publish(self, work: asyncio.TaskGroup) -> None:
        for name, devices in self.listing.items():
            endpoint = self.endpoints.get(name)
            if endpoint is None:
                endpoint = Endpoint(
                    name, self.socket_directory, self.helper, self.settings.allocation_policy, self.usage.allocated
                )
                self.endpoints[name] = endpoint
                log.info(
                    "resource appeared", extra={"fields": {"resource": f"{NAMESPACE}/{name}", "devices": len(devices)}}
                )
                endpoint.update(devices)
                work.create_task(endpoint.run())
            else:
                endpoint.update(devices)
        for name in [name for name in self.endpoints if name not in self.listing]:
            endpoint = self.endpoints.pop(name)
            log.info("resource withdrawn", extra={"fields": {"resource": f"{NAMESPACE}/{name}"}})
            work.create_task(endpoint.withdraw())
