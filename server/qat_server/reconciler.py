"""The reconcile: from the devices as they are to VFs on the wanted driver and resources served to the kubelet.

    inventory → provisioner → resource names → binding plan → binder → listing → endpoints → kubelet
                    └──────────────── helper ──────────────────┘

`reconcile` is the only function that replaces the inventory and the listing. Everything else puts an entry into the
change queue, and the run loop calls `reconcile` again.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Final

from qat_server import logs
from qat_server.binding.binder import Binder
from qat_server.binding.plan import plan_bindings
from qat_server.devices.change_queue import ChangeQueue
from qat_server.devices.dev_cfg import DevCfgReader
from qat_server.devices.health import HealthMonitor
from qat_server.devices.inventory import Inventory
from qat_server.devices.inventory_cache import InventoryCache
from qat_server.devices.naming import resource_names
from qat_server.instrumentation.conditions import Conditions
from qat_server.kubelet import listing
from qat_server.kubelet.device import Listing
from qat_server.kubelet.endpoints import Endpoints
from qat_server.kubelet.usage import DeviceUsage
from qat_server.provisioning.provisioner import Provisioner
from qat_server.provisioning.watch import ConfigurationWatch
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError

log = logs.get(__name__)

_AFTER_DEFECT: Final = 1.0  # seconds


@dataclass
class Reconciler:
    """The parts that a reconcile goes through, in their order, and its results.

    `listing` is what the kubelet is offered, `names` the resource of each VF, `foreign` the driver to which somebody
    else bound a VF, `error` why there is no result yet ("" when there is one).
    """

    inventory: InventoryCache
    configuration: ConfigurationWatch | None
    provisioner: Provisioner
    health: HealthMonitor
    dev_cfgs: DevCfgReader
    binder: Binder
    usage: DeviceUsage
    endpoints: Endpoints
    queue: ChangeQueue
    conditions: Conditions
    driver: DpdkDriver
    listing: Listing = field(default_factory=dict)
    names: dict[PciAddress, str] = field(default_factory=dict)
    foreign: dict[PciAddress, str] = field(default_factory=dict)
    error: str = "starting"

    def reset(self, reason: str) -> None:
        """There is no result until the next reconcile; `reason` says why."""
        self.error = reason

    async def reconcile_safely(self, changed: frozenset[PciAddress] | None, work: asyncio.TaskGroup) -> bool:
        """Reconcile, and return whether it succeeded. A defect must not end what is already served."""
        try:
            await self.reconcile(changed, work)
        except Exception as error:
            log.exception("reconcile failed")
            self.error = f"a defect of this server keeps the devices from being reconciled: {error!r}"
            await asyncio.sleep(_AFTER_DEFECT)
            self.queue.rescan()
            return False
        finally:
            self.conditions.settle()
        return True

    async def reconcile(self, changed: frozenset[PciAddress] | None, work: asyncio.TaskGroup) -> None:
        """Read the devices in `changed` again (None for all), and start the work on them in tasks of `work`."""
        if changed is None or changed:
            self.binder.discovery_started()
            try:
                await self.inventory.refresh(changed)
            except SysfsError as error:
                self.error = str(error)
                return
        inventory = self.inventory.current
        self.inventory.report()
        if self.configuration is not None:
            if changed is None:
                self.configuration.load()
            await self.provisioner.reconcile(inventory, self.configuration.current, self._holders, work)
        if not inventory.vfs and not self.provisioner.working:
            self.inventory.report_no_vfs()
        self.health.update()
        self.dev_cfgs.reconcile(inventory, self.conditions, work)
        self.names = resource_names(inventory, self.dev_cfgs.texts)
        self._bind(inventory, work)
        self.listing = listing.next_listing(
            self.listing,
            inventory,
            names=self._names_to_list(inventory),
            unhealthy=self._unhealthy(),
            driver=self.driver,
            pods=self.endpoints,
        )
        self.usage.track_unhealthy(self.listing)
        self.error = ""
        # The first list must have what pods hold, even if it has gone: the kubelet's answer leads to a reconcile.
        if self.usage.synced:
            self.endpoints.publish(self.listing, work)
            self.provisioner.published()

    def _bind(self, inventory: Inventory, work: asyncio.TaskGroup) -> None:
        plan = plan_bindings(inventory, self.driver)
        self.foreign = dict(plan.foreign)
        for address, driver in plan.foreign:
            self.conditions.report("VF left alone: somebody bound it to another driver", address=address, driver=driver)
        wanted = self.provisioner.may_be_bound(inventory, (*plan.bind, *self.binder.timed_out))
        self.binder.reconcile(wanted, work)

    def _holders(self) -> dict[PciAddress, str] | None:
        return self.endpoints.holder_names(self.listing)

    def _unhealthy(self) -> dict[PciAddress, str]:
        """The reason by unhealthy PF or VF. The last source wins: binding, health of the PFs, provisioning."""
        binding = dict.fromkeys(self.binder.pending, "it is being bound")
        return binding | self.health.unhealthy() | self.provisioner.withheld

    def _names_to_list(self, inventory: Inventory) -> dict[PciAddress, str]:
        """The names, without new VFs that are being bound or whose PF has not answered its first heartbeat yet."""
        pending_pfs, pending_vfs = self.health.pending(), self.binder.pending
        if not pending_pfs and not pending_vfs:
            return self.names
        listed = {device.address for devices in self.listing.values() for device in devices}
        unknown = {vf.address for vf in inventory.vfs if vf.pf in pending_pfs or vf.address in pending_vfs} - listed
        return {address: name for address, name in self.names.items() if address not in unknown}
