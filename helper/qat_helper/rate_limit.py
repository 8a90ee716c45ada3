"""Rate limits: one token bucket for each uid and limit (policy.py: Rate)."""

from collections.abc import Callable, Mapping

from msgspec import Struct

from qat_helper.policy import Rate


class _Bucket(Struct):
    tokens: float
    updated: float
    refused: bool = False


class RateLimiter:
    """The buckets of all uids. Names without a configured rate are not limited."""

    def __init__(self, rates: Mapping[str, Rate], clock: Callable[[], float]) -> None:
        self._rates = rates
        self._clock = clock
        self._buckets: dict[tuple[int, str], _Bucket] = {}

    def take(self, uid: int, name: str) -> bool:
        """Take a token; False when the bucket is empty."""
        if (rate := self._rates.get(name)) is None:
            return True
        now = self._clock()
        bucket = self._buckets.setdefault((uid, name), _Bucket(rate.burst, now))
        bucket.tokens = min(rate.burst, bucket.tokens + (now - bucket.updated) * rate.per_second)
        bucket.updated = now
        bucket.refused = bucket.refused and bucket.tokens < rate.burst
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def first_refusal(self, uid: int, name: str) -> bool:
        """Whether this is the first refusal since the bucket was full. Only that one gets an audit line."""
        bucket = self._buckets[uid, name]
        first, bucket.refused = not bucket.refused, True
        return first
