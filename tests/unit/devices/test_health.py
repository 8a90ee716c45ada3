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
    """Stands for the helper: one scripted answer or error for each PF."""

    def __init__(self) -> None:
        self.by_pf: dict[PciAddress, bool | HelperError] = {PF: True, OTHER: True}
        self.asked: list[PciAddress] = []

    async def heartbeat(self, address: PciAddress) -> Heartbeat:
        self.asked.append(address)
        answer = self.by_pf[address]
        if isinstance(answer, HelperError):
            raise answer
        return Heartbeat(id=1, audit=AuditHead(sequence=0, hash=""), alive=answer)


async def test_answers() -> None:
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
    assert list(monitor.unhealthy()) == [PF], "while the helper is away, the last verdict stands"

    answers.by_pf[OTHER] = HelperNotRespondingError("ReadHeartbeat")
    await check()
    assert list(monitor.unhealthy()) == [PF], "a helper that hangs says nothing about a device"

    answers.by_pf[PF] = HelperError(ErrorCode.UNAVAILABLE, "no heartbeat file")
    await check()
    assert monitor.unhealthy() == {}, "a PF without a heartbeat has none held against it"

    answers.by_pf = {PF: True, OTHER: False}
    await check()
    assert list(monitor.unhealthy()) == [OTHER]
    pfs.pop()
    monitor.update()
    assert monitor.unhealthy() == {}, "a PF that went away has no verdict"
    assert OTHER not in monitor.heartbeats

    pfs[0] = physical(state="down")
    assert list(monitor.unhealthy()) == [PF]


async def test_the_interval_can_be_set_at_any_time_and_zero_is_never() -> None:
    answers, changes = Answers(), []
    monitor = HealthMonitor(cast("HelperClient", answers), lambda: [physical()], 0, lambda: changes.append(1))
    running = asyncio.create_task(monitor.run())
    try:
        await asyncio.sleep(0)
        assert answers.asked == []
        answers.by_pf[PF] = False
        monitor.set_interval(0.001)
        await until(lambda: len(answers.asked) > 3)
        assert list(monitor.unhealthy()) == [PF]
        monitor.set_interval(0)
        assert monitor.unhealthy() == {}, "what nobody looks at any more is not held against it"
        await until(lambda: changes == [1, 1])
        monitor.set_interval(3600)
        asked = len(answers.asked)
        await until(lambda: len(answers.asked) > asked)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_query_that_does_not_end_is_no_life() -> None:
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


async def test_a_new_pf_is_pending_until_its_first_answer_or_for_a_moment() -> None:
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
    assert never.pending() == set(), "nobody asks"


async def test_one_that_hangs_holds_up_no_other_and_a_new_one_is_asked_at_once() -> None:
    pfs = [physical(), physical(OTHER)]
    told: list[dict[PciAddress, bool]] = []
    hung: asyncio.Future[Heartbeat] = asyncio.get_running_loop().create_future()
    other_alive = True

    class Hanging:
        async def heartbeat(self, address: PciAddress) -> Heartbeat:
            if address == PF:
                return await hung
            return Heartbeat(id=1, audit=AuditHead(sequence=0, hash=""), alive=other_alive)

    monitor = HealthMonitor(
        cast("HelperClient", Hanging()), lambda: pfs, 0.01, lambda: told.append(dict(monitor.heartbeats))
    )
    task = asyncio.create_task(monitor.run())
    try:
        await until(lambda: told == [{OTHER: True}])
        other_alive = False
        await until(lambda: told == [{OTHER: True}, {OTHER: False}])
        pfs[:] = [physical(THIRD)]
        monitor.update()
        await until(lambda: monitor.heartbeats.get(THIRD) is False)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_pf_that_is_down_is_not_asked() -> None:
    answers, down = Answers(), physical(state="down")
    monitor = HealthMonitor(cast("HelperClient", answers), lambda: [down, physical(OTHER)], 0.01, lambda: None)
    task = asyncio.create_task(monitor.run())
    try:
        await until(lambda: answers.asked.count(OTHER) > 2)
        assert PF not in answers.asked
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
