"""The reconcile: from the devices as they are to VFs on the wanted driver and resources served to the kubelet.

    inventory → provisioner → resource names → binding plan → binder → listing → endpoints → kubelet
                    └──────────────── helper ──────────────────┘

`reconcile` is the only function that replaces the inventory and the listing. Everything else puts an entry into the
change queue, and the run loop calls `reconcile` again.
"""

import asyncio

from qat_server import logs
from qat_server.binding import plan as binding
from qat_server.binding.binder import Binder
from qat_server.devices.change_queue import ChangeQueue
from qat_server.devices.health import HealthMonitor
from qat_server.devices.inventory import Inventory
from qat_server.devices.inventory_cache import InventoryCache
from qat_server.devices.resource_names import ResourceNames
from qat_server.instrumentation.conditions import Conditions
from qat_server.kubelet import listing
from qat_server.kubelet.device import Listing
from qat_server.kubelet.endpoints import Endpoints
from qat_server.kubelet.usage import Usage
from qat_server.provisioning.provisioner import Provisioner
from qat_server.provisioning.watch import ConfigurationWatch
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError

log = logs.get(__name__)

_AFTER_DEFECT = 1.0  # seconds


class Reconciler:
    """The parts that a reconcile goes through, in their order, and its results.

    `listing` is what the kubelet is offered, `names` the resource of each VF, `foreign` the driver to which somebody
    else bound a VF, `error` why there is no result yet ("" when there is one).
    """

    def __init__(
        self,
        inventory: InventoryCache,
        configuration: ConfigurationWatch | None,
        provisioner: Provisioner,
        health: HealthMonitor,
        resource_names: ResourceNames,
        binder: Binder,
        usage: Usage,
        endpoints: Endpoints,
        queue: ChangeQueue,
        conditions: Conditions,
        driver: DpdkDriver,
    ) -> None:
        self._inventory = inventory
        self._configuration = configuration
        self._provisioner = provisioner
        self._health = health
        self._resource_names = resource_names
        self._binder = binder
        self._usage = usage
        self._endpoints = endpoints
        self._queue = queue
        self._conditions = conditions
        self._driver = driver
        self.listing: Listing = {}
        self.names: dict[PciAddress, str] = {}
        self.foreign: dict[PciAddress, str] = {}
        self.error = "starting"

    async def reconcile_safely(self, changed: frozenset[PciAddress] | None, work: asyncio.TaskGroup) -> bool:
        """Reconcile; whether it went without a defect. A defect must not end what is already served."""
        try:
            await self.reconcile(changed, work)
        except Exception as error:
            log.exception("reconcile failed")
            self.error = f"a defect of this server keeps the devices from being reconciled: {error!r}"
            await asyncio.sleep(_AFTER_DEFECT)
            self._queue.rescan()
            return False
        finally:
            self._conditions.settle()
        return True

    async def reconcile(self, changed: frozenset[PciAddress] | None, work: asyncio.TaskGroup) -> None:
        """Read the devices in `changed` again (None for all), and start the work on them in tasks of `work`."""
        if changed is None or changed:
            self._binder.discovery_started()
            try:
                await self._inventory.refresh(changed)
            except SysfsError as error:
                self.error = str(error)
                return
        inventory = self._inventory.current
        self._inventory.report()
        if self._configuration is not None:
            if changed is None:
                self._configuration.load()
            await self._provisioner.reconcile(inventory, self._configuration.current, self._holders, work)
        if not inventory.vfs and not self._provisioner.working:
            self._inventory.report_no_vfs()
        self._health.update()
        self._resource_names.reconcile(inventory, self._conditions, work)
        self.names = self._resource_names.of(inventory)
        self._bind(inventory, work)
        self.listing = listing.next_listing(
            self.listing,
            inventory,
            self._offered(inventory),
            dict.fromkeys(self._binder.pending, "it is being bound")
            | self._health.unhealthy()
            | self._provisioner.withheld,
            self._driver,
            self._endpoints.releasable,
            self._endpoints.held,
            self._usage.holders,
        )
        self._usage.observe(self.listing)
        self.error = ""
        # The first list must have what pods hold, even if it has gone: the kubelet's answer leads to a reconcile.
        if self._usage.asked:
            self._endpoints.publish(self.listing, work)
            self._provisioner.published()

    def _bind(self, inventory: Inventory, work: asyncio.TaskGroup) -> None:
        plan = binding.plan(inventory, self._driver)
        self.foreign = dict(plan.foreign)
        for address, driver in plan.foreign:
            self._conditions.report(
                "VF left alone: somebody bound it to another driver", address=address, driver=driver
            )
        wanted = self._provisioner.may_be_bound(inventory, (*plan.bind, *self._binder.timed_out))
        self._binder.reconcile(wanted, work)

    def _holders(self) -> dict[PciAddress, str] | None:
        return self._usage.holders_of(self.listing, self._endpoints.held)

    def _offered(self, inventory: Inventory) -> dict[PciAddress, str]:
        """The names, without new VFs that are being bound or whose PF has not answered its first heartbeat yet."""
        pending_pfs, pending_vfs = self._health.pending(), self._binder.pending
        if not pending_pfs and not pending_vfs:
            return self.names
        listed = {device.address for devices in self.listing.values() for device in devices}
        unknown = {vf.address for vf in inventory.vfs if vf.pf in pending_pfs or vf.address in pending_vfs} - listed
        return {address: name for address, name in self.names.items() if address not in unknown}
