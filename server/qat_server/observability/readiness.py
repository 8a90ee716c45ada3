"""What keeps the server from doing all of its work, in words: now (`not_ready`), and at its start (`missing`).

The start waits for what a moment may bring: devices that are probed, provisioned, bound, asked for their services. Not
for the kubelet, which may be waiting for this start; nor for what only somebody else can change.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from qat_server.binding.binder import Binder
from qat_server.command_line.settings import Settings
from qat_server.devices.health import HealthMonitor
from qat_server.devices.inventory import Inventory, PhysicalFunction
from qat_server.devices.kernel_drivers import pf_driver_of
from qat_server.devices.pci_bus import pci_addresses
from qat_server.devices.resource_names import Services
from qat_server.devices.uevents import Changes
from qat_server.helper_client.client import HelperClient
from qat_server.kubelet.endpoint_directory import EndpointDirectory
from qat_server.kubelet.endpoints import Endpoints
from qat_server.kubelet.usage import Usage
from qat_server.provisioning.progress import Stage
from qat_server.provisioning.provisioner import Provisioner
from qat_server.provisioning.watch import ConfigurationWatch
from qat_shared import NAMESPACE
from qat_shared.devices import PHYSICAL, VENDOR_INTEL
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError, open_device


class Parts(Protocol):
    """Those who do the work. `look_error` says why the last look at the devices was none, "" when it was one."""

    look_error: str
    inventory: Inventory
    settings: Settings
    changes: Changes
    directory: EndpointDirectory
    helper: HelperClient
    configuration: ConfigurationWatch | None
    provisioner: Provisioner
    services: Services
    binder: Binder
    health: HealthMonitor
    usage: Usage
    endpoints: Endpoints


def not_ready(at: Parts) -> tuple[str, ...]:
    """The reasons why the server does not do all of its work, none when it does."""
    reasons = list(_hindrances(at))
    if not at.usage.asked and not (at.directory.waits_for or at.look_error):
        reasons.append(f"what pods hold is not known yet: {at.usage.error}")
    reasons += [f"PF {address} is being provisioned" for address in at.provisioner.working]
    reasons += [
        f"{NAMESPACE}/{name} is not registered with the kubelet: {state.error or 'under way'}"
        for name, state in at.endpoints.states.items()
        if not state.registered
    ]
    return tuple(reasons)


def missing(at: Parts) -> tuple[str, ...]:
    """What a start is to wait for."""
    reasons = list(_hindrances(at))
    if at.changes.pending:
        reasons.append("devices have changed, and are looked at again")
    reasons += [f"{problem.address or 'PCI bus'}: {problem.text}" for problem in at.inventory.problems]
    if at.configuration is not None:
        reasons += filter(None, (_unprovisioned(at, pf) for pf in at.inventory.pfs))
    reasons += at.services.missing()
    reasons += at.binder.missing()
    reasons += [f"PF {address} has not answered its heartbeat query" for address in sorted(at.health.pending())]
    if at.configuration is not None and not reasons:  # last, since it reads the whole bus
        drivers = frozenset(map(pf_driver_of, at.settings.kernel_vf_drivers))
        waiting = _without_driver(at.settings.sysfs_root, drivers)
        reasons += [f"PF {address} has no driver" for address in waiting]
    return tuple(reasons)


def _unprovisioned(at: Parts, pf: PhysicalFunction) -> str:
    """What is to be made of a PF yet, "" for nothing that a moment may bring."""
    one = at.provisioner.progress.get(pf.address)
    if one is None or pf.address in at.provisioner.given_up or one.stage in (Stage.DONE, Stage.WAITING):
        return ""
    # Attributes come after the driver's link: until then it only seems impossible.
    if one.stage is Stage.IMPOSSIBLE and pf.services is not None:
        return ""
    return f"PF {pf.address} is not provisioned: {one.reason or one.stage}"


def _hindrances(at: Parts) -> Iterator[str]:
    if reason := at.directory.waits_for or at.look_error:
        yield reason
    # A directory that waits for the helper has said this already.
    if not at.helper.connected and at.helper.error not in reason:
        yield at.helper.error
    if at.configuration is not None and at.configuration.current is None:
        yield f"no provisioning configuration: {at.configuration.error or 'not read yet'}"


def _without_driver(root: Path, drivers: frozenset[str]) -> Sequence[PciAddress]:
    """PFs that are on the bus, and will have VFs once their driver has been loaded."""
    found = []
    try:
        addresses = pci_addresses(root)
    except OSError:
        return ()  # look_error says so
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
