"""How many requests each uid may still make: token buckets, one for each of its limits (policy.py: Rate)."""

from collections.abc import Callable, Mapping

from msgspec import Struct

from qat_helper.policy import Rate


class _Bucket(Struct):
    left: float
    since: float
    refused: bool = False


class Allowance:
    """The buckets of all uids. Without a limit of that name, there is no bound."""

    def __init__(self, rates: Mapping[str, Rate], clock: Callable[[], float]) -> None:
        self._rates = rates
        self._clock = clock
        self._buckets: dict[tuple[int, str], _Bucket] = {}

    def take(self, uid: int, name: str) -> bool:
        """Use one up, if there is one."""
        if (rate := self._rates.get(name)) is None:
            return True
        now = self._clock()
        bucket = self._buckets.setdefault((uid, name), _Bucket(rate.burst, now))
        bucket.left = min(rate.burst, bucket.left + (now - bucket.since) * rate.per_second)
        bucket.since = now
        bucket.refused = bucket.refused and bucket.left < rate.burst
        if bucket.left < 1:
            return False
        bucket.left -= 1
        return True

    def first_refusal(self, uid: int, name: str) -> bool:
        """Whether it is the first since the bucket was full: that one has a line in the audit log."""
        bucket = self._buckets[uid, name]
        first, bucket.refused = not bucket.refused, True
        return first
