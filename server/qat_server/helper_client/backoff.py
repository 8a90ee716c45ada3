"""When a failed operation of the helper is tried again for a device. `Backoff` is pure: the time is passed in."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Final

from msgspec import Struct

from qat_shared.pci import PciAddress

FIRST_DELAY: Final = 0.5
LONGEST_DELAY: Final = 60.0
_DOUBLINGS: Final = 7  # 0.5 s doubled this often is over the longest delay


class Failures(Struct, frozen=True):
    """How often the operation has failed in a row for one device, and the earliest time of the next attempt."""

    count: int
    next_at: float


class Backoff(Struct, frozen=True):
    """Exponential backoff by device: 0.5 s after the first failure, doubled by each further one, at most 60 s.

    Immutable: a method that changes something returns a new Backoff. Times are seconds of one monotonic clock.
    """

    failures: Mapping[PciAddress, Failures] = {}

    def failed(self, address: PciAddress, now: float) -> "Backoff":
        """Count one more failure of a device."""
        before = self.failures.get(address)
        count = before.count + 1 if before else 1
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(count - 1, _DOUBLINGS))
        return Backoff({**self.failures, address: Failures(count, now + delay)})

    def keep(self, wanted: Collection[PciAddress]) -> "Backoff":
        """Forget every device but these."""
        if all(address in wanted for address in self.failures):
            return self
        return Backoff({address: failures for address, failures in self.failures.items() if address in wanted})

    def without(self, address: PciAddress) -> "Backoff":
        """Forget one device: the operation succeeded, or is to be tried at once."""
        if address not in self.failures:
            return self
        return Backoff({other: failures for other, failures in self.failures.items() if other != address})

    def due(self, address: PciAddress, now: float) -> bool:
        """Whether the operation may be tried now."""
        failures = self.failures.get(address)
        return failures is None or failures.next_at <= now

    def next_due(self, now: float) -> float | None:
        """The earliest time after `now` at which a device becomes due, None when none waits."""
        return min((failures.next_at for failures in self.failures.values() if failures.next_at > now), default=None)


class WakeUp:
    """One timer for the next device that becomes due. `callback` is called in the running loop."""

    def __init__(self, callback: Callable[[], None], clock: Callable[[], float]) -> None:
        self._callback = callback
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    def at(self, due: float | None) -> None:
        """Replace the time of the call; None for no call."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - self._clock()), self._callback)
