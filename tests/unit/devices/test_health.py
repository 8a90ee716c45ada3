"""Health of PFs: a table of reasons, and heartbeat queries through a stand-in for the helper."""

import asyncio
from typing import cast

import pytest

from qat_server.devices.health import FIRST_RESULT_WAIT, HealthMonitor, unhealthy_reason
from qat_server.devices.inventory import PhysicalFunction
from qat_server.helper_client.client import HelperClient, HelperError, HelperNotRespondingError, HelperUnavailableError
from qat_shared.messages import AuditHead, ErrorCode, Heartbeat
from qat_shared.pci import PciAddress
from support.conditions import until

PF = PciAddress.parse("0000:6b:00.0")
OTHER = PciAddress.parse("0000:70:00.0")
THIRD = PciAddress.parse("0000:75:00.0")


def physical(address: PciAddress = PF, state: str | None = "up") -> PhysicalFunction:
    return PhysicalFunction(address, 0x4940, "4xxx", 0, state, "dc", 16, ())


REASONS = [
    ("up and alive", "up", True, ""),
    ("no heartbeat known", "up", None, ""),
    ("no qat attributes", None, True, ""),
    ("heartbeat lost", "up", False, "PF 0000:6b:00.0 does not answer its heartbeat"),
    ("down", "down", True, "PF 0000:6b:00.0 is down"),
    ("down and not alive", "down", False, "PF 0000:6b:00.0 is down"),
]


@pytest.mark.parametrize(("state", "alive", "expected"), [row[1:] for row in REASONS], ids=[row[0] for row in REASONS])
def test_unhealthy_reason(state: str | None, alive: bool | None, expected: str) -> None:
    assert unhealthy_reason(physical(state=state), alive) == expected


class Answers:
    """Stands in for the helper: one scripted answer or error for each PF."""

    def __init__(self) -> None:
        self.by_pf: dict[PciAddress, bool | HelperError] = {PF: True, OTHER: True}
        self.queried: list[PciAddress] = []

    async def heartbeat(self, address: PciAddress) -> Heartbeat:
        self.queried.append(address)
        answer = self.by_pf[address]
        if isinstance(answer, HelperError):
            raise answer
        return Heartbeat(id=1, audit=AuditHead(sequence=0, hash=""), alive=answer)


async def test_results_of_queries() -> None:
    answers, changes = Answers(), []
    pfs = [physical(), physical(OTHER)]
    monitor = HealthMonitor(cast("HelperClient", answers), lambda: pfs, 5, lambda: changes.append(1))

    async def check() -> None:
        monitor.update()
        for pf in list(pfs):
            await monitor.query(pf.address)

    await check()
    assert (monitor.unhealthy(), len(changes)) == ({}, 2)
    await check()
    assert len(changes) == 2, "nothing changed"

    answers.by_pf[PF] = False
    await check()
    assert monitor.unhealthy() == {PF: "PF 0000:6b:00.0 does not answer its heartbeat"}
    assert len(changes) == 3

    answers.by_pf[PF] = HelperUnavailableError("gone")
    answers.by_pf[OTHER] = HelperError(ErrorCode.BUSY, "an earlier one has not ended")
    await check()
    assert list(monitor.unhealthy()) == [PF], "while the helper is away, the last result stays"

    answers.by_pf[OTHER] = HelperNotRespondingError("ReadHeartbeat")
    await check()
    assert list(monitor.unhealthy()) == [PF], "a helper that hangs says nothing about a device"

    answers.by_pf[PF] = HelperError(ErrorCode.UNAVAILABLE, "no heartbeat file")
    await check()
    assert monitor.unhealthy() == {}, "a PF without a heartbeat counts as healthy"

    answers.by_pf = {PF: True, OTHER: False}
    await check()
    assert list(monitor.unhealthy()) == [OTHER]
    pfs.pop()
    monitor.update()
    assert monitor.unhealthy() == {}, "a PF that has gone is not reported"
    assert OTHER not in monitor.heartbeats

    pfs[0] = physical(state="down")
    assert list(monitor.unhealthy()) == [PF]


async def test_the_interval_can_change_at_any_time_and_zero_turns_queries_off() -> None:
    answers, changes = Answers(), []
    monitor = HealthMonitor(cast("HelperClient", answers), lambda: [physical()], 0, lambda: changes.append(1))
    running = asyncio.create_task(monitor.run())
    try:
        await asyncio.sleep(0)
        assert answers.queried == []
        answers.by_pf[PF] = False
        monitor.set_interval(0.001)
        await until(lambda: len(answers.queried) > 3)
        assert list(monitor.unhealthy()) == [PF]
        monitor.set_interval(0)
        assert monitor.unhealthy() == {}, "results are dropped when queries are turned off"
        await until(lambda: changes == [1, 1])
        monitor.set_interval(3600)
        queried = len(answers.queried)
        await until(lambda: len(answers.queried) > queried)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_pf_whose_query_does_not_end_is_unhealthy() -> None:
    answers = Answers()
    monitor = HealthMonitor(cast("HelperClient", answers), lambda: [physical()], 5, lambda: None)
    await monitor.query(PF)
    for error in (ErrorCode.TIMED_OUT, ErrorCode.BUSY):
        answers.by_pf[PF] = HelperError(error, "it has not ended")
        await monitor.query(PF)
        assert monitor.unhealthy() == {PF: "PF 0000:6b:00.0 has not answered its heartbeat query"}
        assert monitor.heartbeats == {PF: False}
    answers.by_pf[PF] = True
    await monitor.query(PF)
    assert monitor.unhealthy() == {}


async def test_a_new_pf_is_pending_until_its_first_result_or_for_a_limited_time() -> None:
    answers, now, pfs = Answers(), [0.0], [physical()]
    monitor = HealthMonitor(cast("HelperClient", answers), lambda: pfs, 5, lambda: None, lambda: now[0])
    monitor.update()
    assert monitor.pending() == {PF}
    await monitor.query(PF)
    assert monitor.pending() == set()
    pfs.append(physical(OTHER))
    monitor.update()
    assert monitor.pending() == {OTHER}
    now[0] += FIRST_RESULT_WAIT
    assert monitor.pending() == set()
    never = HealthMonitor(cast("HelperClient", answers), lambda: pfs, 0, lambda: None)
    never.update()
    assert never.pending() == set(), "there are no queries"


async def test_a_query_that_hangs_delays_no_other_and_a_new_pf_is_queried_at_once() -> None:
    pfs = [physical(), physical(OTHER)]
    changes: list[dict[PciAddress, bool]] = []
    hung: asyncio.Future[Heartbeat] = asyncio.get_running_loop().create_future()
    other_alive = True

    class Hanging:
        async def heartbeat(self, address: PciAddress) -> Heartbeat:
            if address == PF:
                return await hung
            return Heartbeat(id=1, audit=AuditHead(sequence=0, hash=""), alive=other_alive)

    monitor = HealthMonitor(
        cast("HelperClient", Hanging()), lambda: pfs, 0.01, lambda: changes.append(dict(monitor.heartbeats))
    )
    task = asyncio.create_task(monitor.run())
    try:
        await until(lambda: changes == [{OTHER: True}])
        other_alive = False
        await until(lambda: changes == [{OTHER: True}, {OTHER: False}])
        pfs[:] = [physical(THIRD)]
        monitor.update()
        await until(lambda: monitor.heartbeats.get(THIRD) is False)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_pf_that_is_down_is_not_queried() -> None:
    answers, down = Answers(), physical(state="down")
    monitor = HealthMonitor(cast("HelperClient", answers), lambda: [down, physical(OTHER)], 0.01, lambda: None)
    task = asyncio.create_task(monitor.run())
    try:
        await until(lambda: answers.queried.count(OTHER) > 2)
        assert PF not in answers.queried
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
