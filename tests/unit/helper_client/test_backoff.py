"""Backoff by device: when a failed operation is tried again."""

import asyncio

from qat_server.helper_client.backoff import Backoff, WakeUp
from support.conditions import until
from support.sysfs_tree import address

VF, OTHER = address("6b:00.1"), address("6b:00.2")


def test_delays_double_up_to_a_minute() -> None:
    attempts, now, delays = Backoff(), 100.0, []
    for _ in range(9):
        assert attempts.due(VF, now)
        attempts = attempts.failed(VF, now)
        due = attempts.next_due(now)
        assert due is not None
        assert not attempts.due(VF, due - 0.001)
        delays.append(due - now)
        now = due

    assert delays == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_each_vf_has_its_own_delay() -> None:
    attempts = Backoff().failed(VF, 10.0).failed(OTHER, 10.2)

    assert (attempts.due(VF, 10.5), attempts.due(OTHER, 10.5)) == (True, False)
    assert attempts.next_due(10.0) == 10.5
    assert attempts.next_due(10.5) == 10.7, "a VF that is due already needs no wake-up"
    assert attempts.next_due(11.0) is None


def test_vfs_that_are_not_kept_are_forgotten() -> None:
    attempts = Backoff().failed(VF, 10.0).failed(VF, 11.0).failed(OTHER, 10.0)

    assert attempts.keep({VF, OTHER}) is attempts
    kept = attempts.keep({OTHER})
    assert kept.due(VF, 10.0)
    assert kept.failed(VF, 20.0).next_due(20.0) == 20.5, "its delay starts again"
    assert kept.next_due(10.0) == 10.5


def test_many_failures_do_not_overflow() -> None:
    attempts = Backoff()
    for _ in range(2000):
        attempts = attempts.failed(VF, 0.0)
    assert attempts.next_due(0.0) == 60.0


async def test_a_wake_up_calls_once_at_its_last_time() -> None:
    calls: list[int] = []
    wake_up = WakeUp(lambda: calls.append(1), lambda: 100.0)
    wake_up.at(99.0)  # a time in the past means at once
    await until(lambda: calls == [1])
    wake_up.at(100.0)
    wake_up.at(3700.0)
    await asyncio.sleep(0)
    wake_up.at(None)
    assert calls == [1], "a replaced or removed time gives no call"
