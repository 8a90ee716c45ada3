"""What has happened so far, as plain numbers of the event loop's thread: adding costs an integer, and no library.

metrics.py turns them into Prometheus' text when somebody asks.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Final


class Histogram:
    """Durations in seconds, counted by upper bound (the last bucket is without bound)."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds: Final = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds


class Counters:
    """All counters of a server. `outcome` is "ok" or an ErrorCode's value."""

    def __init__(self) -> None:
        self.helper_requests: Counter[tuple[str, ...]] = Counter()  # operation, outcome
        self.audit_breaks = 0
        self.bind_attempts: Counter[str] = Counter()  # driver
        self.bind_failures: Counter[tuple[str, ...]] = Counter()  # driver, outcome
        self.bind_seconds = Histogram((0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0))
        self.allocations: Counter[tuple[str, ...]] = Counter()  # resource, outcome
        self.allocated_devices: Counter[str] = Counter()  # resource
        self.preferred_allocations: Counter[tuple[str, ...]] = Counter()  # resource, outcome
        self.resyncs = 0
        self.rescan_seconds = Histogram((0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0))

    def helper_request(self, operation: str, outcome: str = "ok") -> None:
        """A request to the helper was answered, or failed."""
        self.helper_requests[operation, outcome] += 1

    def audit_break(self) -> None:
        """The head of the helper's audit log did not follow the one before."""
        self.audit_breaks += 1

    def bind(self, driver: str, seconds: float, outcome: str = "ok") -> None:
        """A VF's binding ended after `seconds`."""
        self.bind_attempts[driver] += 1
        if outcome != "ok":
            self.bind_failures[driver, outcome] += 1
        self.bind_seconds.observe(seconds)

    def allocation(self, resource: str, devices: int, outcome: str = "ok") -> None:
        """An Allocate for one container was answered."""
        self.allocations[resource, outcome] += 1
        if outcome == "ok":
            self.allocated_devices[resource] += devices

    def preferred_allocation(self, resource: str, outcome: str = "ok") -> None:
        """A GetPreferredAllocation for one container was answered."""
        self.preferred_allocations[resource, outcome] += 1

    def resync(self) -> None:
        """A look at everything was made because of the timer, an overrun or a change of the helper."""
        self.resyncs += 1

    def rescan(self, seconds: float) -> None:
        """A look at the devices took `seconds`."""
        self.rescan_seconds.observe(seconds)
