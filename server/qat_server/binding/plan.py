"""What is to be done so that the VFs are on the wanted driver, and when to try again what failed.

Pure: an Inventory in, a Plan out; the clock's time is passed in. Who carries it out is binder.py.
"""

from msgspec import Struct

from qat_server.devices.inventory import Inventory
from qat_shared.devices import VIRTUAL
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress


class Plan(Struct, frozen=True):
    """`bind`: VFs to be bound now. `foreign`: VFs that somebody gave to another driver, with its name: left alone."""

    bind: tuple[PciAddress, ...]
    foreign: tuple[tuple[PciAddress, str], ...]


def plan(inventory: Inventory, driver: DpdkDriver) -> Plan:
    """Bind what has no driver or its own kernel VF driver. The other DPDK driver is somebody's choice too: foreign."""
    bind = []
    foreign = []
    for vf in inventory.vfs:
        kind = VIRTUAL.get(vf.device_id)
        if vf.driver is None or (kind is not None and vf.driver == kind.driver):
            bind.append(vf.address)
        elif vf.driver != driver:
            foreign.append((vf.address, vf.driver))
    return Plan(tuple(bind), tuple(foreign))
