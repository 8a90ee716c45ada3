"""What is to be done so that the VFs are on the wanted driver, and when to try again what failed.

Pure: an Inventory in, a Plan out; the clock's time is passed in. Who carries it out is binder.py.
"""

from collections.abc import Collection, Mapping
from typing import Final

from msgspec import Struct

from qat_server.devices.inventory import Inventory
from qat_shared.devices import VIRTUAL
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress

FIRST_DELAY: Final = 0.5
LONGEST_DELAY: Final = 60.0
_DOUBLINGS: Final = 7  # 0.5 s doubled so often is over the longest delay


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


class Failures(Struct, frozen=True):
    """How often one VF could not be bound in a row, and the earliest time for the next attempt."""

    count: int
    next_at: float


class Attempts(Struct, frozen=True):
    """What failed and waits: 0.5 s after the first failure, twice as long after each further one, 60 s at most.

    Each method that changes something answers with a new Attempts. Times are seconds of one monotonic clock.
    """

    failures: Mapping[PciAddress, Failures] = {}

    def failed(self, address: PciAddress, now: float) -> "Attempts":
        """After one more failure."""
        before = self.failures.get(address)
        count = before.count + 1 if before else 1
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(count - 1, _DOUBLINGS))
        return Attempts({**self.failures, address: Failures(count, now + delay)})

    def keep(self, wanted: Collection[PciAddress]) -> "Attempts":
        """Without the VFs that are not to be bound any more: they are bound, vanished, or somebody else's by now."""
        if all(address in wanted for address in self.failures):
            return self
        return Attempts({address: failures for address, failures in self.failures.items() if address in wanted})

    def without(self, address: PciAddress) -> "Attempts":
        """After a success, or when it is to be tried anew: nothing of it is known."""
        if address not in self.failures:
            return self
        return Attempts({other: failures for other, failures in self.failures.items() if other != address})

    def due(self, address: PciAddress, now: float) -> bool:
        """Whether it may be tried now."""
        failures = self.failures.get(address)
        return failures is None or failures.next_at <= now

    def next_due(self, now: float) -> float | None:
        """The earliest time after `now` at which something becomes due, None when nothing waits."""
        return min((failures.next_at for failures in self.failures.values() if failures.next_at > now), default=None)
