"""What keeps the server from doing all of its work, in words: now (`not_ready`), and at its start (`missing`).

The start waits for what a moment may bring: devices that are probed, provisioned, bound, asked for their services. Not
for the kubelet, which may be waiting for this start; nor for what only somebody else can change.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from qat_server.binder import Binder
from qat_server.endpoint_directory import EndpointDirectory
from qat_server.endpoints import Endpoints
from qat_server.events import Changes
from qat_server.health import HealthMonitor
from qat_server.helper_client import HelperClient
from qat_server.inventory import Inventory, PhysicalFunction
from qat_server.kernel_drivers import pf_driver_of
from qat_server.pci_bus import pci_addresses
from qat_server.provisioning.progress import Stage
from qat_server.provisioning.provisioner import Provisioner
from qat_server.provisioning.watch import ConfigurationWatch
from qat_server.services import Services
from qat_server.settings import Settings
from qat_server.usage import Usage
from qat_shared import NAMESPACE
from qat_shared.devices import PHYSICAL, VENDOR_INTEL
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError, open_device


class Readiness:
    """Asks those who do the work. `look` is why the last look at the devices was none, "" when it was one."""

    def __init__(
        self,
        settings: Settings,
        changes: Changes,
        directory: EndpointDirectory,
        helper: HelperClient,
        configuration: ConfigurationWatch | None,
        provisioner: Provisioner,
        services: Services,
        binder: Binder,
        health: HealthMonitor,
        usage: Usage,
        endpoints: Endpoints,
    ) -> None:
        self._settings = settings
        self._changes = changes
        self._directory = directory
        self._helper = helper
        self._configuration = configuration
        self._provisioner = provisioner
        self._services = services
        self._binder = binder
        self._health = health
        self._usage = usage
        self._endpoints = endpoints
        self.look = "starting"

    def not_ready(self) -> tuple[str, ...]:
        """The reasons why the server does not do all of its work, none when it does."""
        reasons = list(self._hindrances())
        if not self._usage.asked and not (self._directory.waits_for or self.look):
            reasons.append(f"what pods hold is not known yet: {self._usage.error}")
        reasons += [f"PF {address} is being provisioned" for address in self._provisioner.working]
        reasons += [
            f"{NAMESPACE}/{name} is not registered with the kubelet: {state.error or 'under way'}"
            for name, state in self._endpoints.states.items()
            if not state.registered
        ]
        return tuple(reasons)

    def missing(self, inventory: Inventory) -> tuple[str, ...]:
        """What a start is to wait for; `inventory` is the last look's."""
        reasons = list(self._hindrances())
        if self._changes.pending:
            reasons.append("devices have changed, and are looked at again")
        reasons += [f"{problem.address or 'PCI bus'}: {problem.text}" for problem in inventory.problems]
        if self._configuration is not None:
            reasons += filter(None, map(self._unprovisioned, inventory.pfs))
        reasons += self._services.missing()
        reasons += self._binder.missing()
        reasons += [f"PF {address} has not answered its heartbeat query" for address in sorted(self._health.pending())]
        if self._configuration is not None and not reasons:  # last, since it reads the whole bus
            drivers = frozenset(map(pf_driver_of, self._settings.kernel_vf_drivers))
            waiting = _without_driver(self._settings.sysfs_root, drivers)
            reasons += [f"PF {address} has no driver" for address in waiting]
        return tuple(reasons)

    def _unprovisioned(self, pf: PhysicalFunction) -> str:
        """What is to be made of a PF yet, "" for nothing that a moment may bring."""
        one = self._provisioner.progress.get(pf.address)
        if one is None or pf.address in self._provisioner.given_up or one.stage in (Stage.DONE, Stage.WAITING):
            return ""
        # A driver has its device before it has shown what that can do.
        if one.stage is Stage.IMPOSSIBLE and pf.services is not None:
            return ""
        return f"PF {pf.address} is not provisioned: {one.reason or one.stage}"

    def _hindrances(self) -> Iterator[str]:
        if reason := self._directory.waits_for or self.look:
            yield reason
        if not self._helper.connected and self._helper.error not in reason:
            yield self._helper.error
        if self._configuration is not None and self._configuration.current is None:
            yield f"no provisioning configuration: {self._configuration.error or 'not read yet'}"


def _without_driver(root: Path, drivers: frozenset[str]) -> Sequence[PciAddress]:
    """PFs that are on the bus, and will have VFs once their driver has been loaded."""
    found = []
    try:
        addresses = pci_addresses(root)
    except OSError:
        return ()
    for address in addresses:
        try:
            with open_device(root, address) as device:
                kind = PHYSICAL.get(device.read_int("device", 16))
                if kind is None or not kind.provisioned or kind.driver not in drivers:
                    continue
                if device.read_int("vendor", 16) == VENDOR_INTEL and device.link("driver") is None:
                    found.append(address)
        except SysfsError:
            continue  # it is going, or will be seen as a problem once it has its driver
    return found
