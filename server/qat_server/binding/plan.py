"""The binding plan: an Inventory in, the VFs to bind out. Pure; binder.py carries it out."""

from msgspec import Struct

from qat_server.devices.inventory import Inventory
from qat_shared.devices import VIRTUAL
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress


class Plan(Struct, frozen=True):
    """`bind`: the VFs to bind. `foreign`: VFs that somebody bound to another driver, with its name; left alone."""

    bind: tuple[PciAddress, ...]
    foreign: tuple[tuple[PciAddress, str], ...]


def plan_bindings(inventory: Inventory, driver: DpdkDriver) -> Plan:
    """Bind each VF that has no driver or its own kernel VF driver. A VF on any other driver than `driver` is foreign.

    That includes the other DPDK driver: somebody chose it.
    """
    bind = []
    foreign = []
    for vf in inventory.vfs:
        kind = VIRTUAL.get(vf.device_id)
        if vf.driver is None or (kind is not None and vf.driver == kind.driver):
            bind.append(vf.address)
        elif vf.driver != driver:
            foreign.append((vf.address, vf.driver))
    return Plan(tuple(bind), tuple(foreign))
