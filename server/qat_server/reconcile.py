"""What must be done so that the VFs are as wanted, and when a failed one is tried again. Pure."""

from collections.abc import Collection
from typing import Final

from msgspec import Struct

from qat_server.inventory import Inventory
from qat_shared.devices import VIRTUAL
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress

_FIRST_DELAY: Final = 0.5
_LAST_DELAY: Final = 60.0


class Plan(Struct, frozen=True):
    """`bind`: VFs to bind. `foreign`: VFs that somebody bound to another driver, which are left alone."""

    bind: tuple[PciAddress, ...]
    foreign: tuple[tuple[PciAddress, str], ...]


def plan(inventory: Inventory, driver: DpdkDriver) -> Plan:
    """Bind what has no driver or the kernel's own VF driver; whatever else has the VF was somebody's decision."""
    bind, foreign = [], []
    for vf in inventory.vfs:
        if vf.driver == driver:
            continue
        if vf.driver is None or vf.driver == VIRTUAL[vf.device_id].driver:
            bind.append(vf.address)
        else:
            foreign.append((vf.address, vf.driver))
    return Plan(tuple(bind), tuple(foreign))


class _Failure(Struct, frozen=True):
    times: int
    retry_at: float


class Attempts(Struct, frozen=True):
    """The failures so far, as an immutable value; times are those of the caller's clock, in seconds."""

    failures: dict[PciAddress, _Failure] = {}

    def failed(self, address: PciAddress, now: float) -> "Attempts":
        """With one failure more: tried again after 0.5 s, then twice as long each time, 60 s at most."""
        times = self.failures[address].times + 1 if address in self.failures else 1
        delay = min(_LAST_DELAY, _FIRST_DELAY * 2 ** min(times - 1, 10))
        return Attempts({**self.failures, address: _Failure(times, now + delay)})

    def keep(self, addresses: Collection[PciAddress]) -> "Attempts":
        """Without those that are no longer wanted."""
        return Attempts({address: failure for address, failure in self.failures.items() if address in addresses})

    def due(self, address: PciAddress, now: float) -> bool:
        """Whether it may be tried now."""
        return address not in self.failures or self.failures[address].retry_at <= now

    def next_due(self, now: float) -> float | None:
        """When the next one that has to wait may be tried, None when none has to."""
        return min((f.retry_at for f in self.failures.values() if f.retry_at > now), default=None)
