"""The server's counters, as plain numbers that only the event loop's thread changes, so that counting is cheap.

observability/metrics.py turns them into Prometheus' text format.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Final


class Histogram:
    """Durations in seconds, counted by upper bound; the last bucket has no bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds: Final = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Add one duration."""
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
        """Count a request to the helper that was answered or failed."""
        self.helper_requests[operation, outcome] += 1

    def audit_break(self) -> None:
        """Count a head of the helper's audit log that cannot follow the head before."""
        self.audit_breaks += 1

    def bind(self, driver: str, seconds: float, outcome: str = "ok") -> None:
        """Count an attempt to bind a VF, which took `seconds`."""
        self.bind_attempts[driver] += 1
        if outcome != "ok":
            self.bind_failures[driver, outcome] += 1
        self.bind_seconds.observe(seconds)

    def allocation(self, resource: str, devices: int, outcome: str = "ok") -> None:
        """Count an answer to Allocate for one container."""
        self.allocations[resource, outcome] += 1
        if outcome == "ok":
            self.allocated_devices[resource] += devices

    def preferred_allocation(self, resource: str, outcome: str = "ok") -> None:
        """Count an answer to GetPreferredAllocation for one container."""
        self.preferred_allocations[resource, outcome] += 1

    def resync(self) -> None:
        """Count a full discovery (resync timer, uevent overrun, new connection to the helper)."""
        self.resyncs += 1

    def rescan(self, seconds: float) -> None:
        """Count a discovery, full or partial, which took `seconds`."""
        self.rescan_seconds.observe(seconds)
