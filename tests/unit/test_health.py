"""Health verdicts: a table, and rounds of heartbeats through a stand-in for the helper."""

import asyncio
from typing import cast

import pytest

from qat_server.health import HealthMonitor, verdict
from qat_server.helper_client import HelperClient, HelperError, HelperUnavailableError
from qat_server.inventory import PhysicalFunction
from qat_shared.messages import AuditHead, ErrorCode, Heartbeat
from qat_shared.pci import PciAddress
from waiting import until

PF = PciAddress.parse("0000:6b:00.0")
OTHER = PciAddress.parse("0000:70:00.0")


def physical(address: PciAddress = PF, state: str | None = "up") -> PhysicalFunction:
    return PhysicalFunction(address, 0x4940, "4xxx", 0, state, "dc", 16, ())


VERDICTS = [
    ("up and alive", "up", True, ""),
    ("no heartbeat known", "up", None, ""),
    ("no qat attributes", None, True, ""),
    ("heartbeat lost", "up", False, "PF 0000:6b:00.0 does not answer its heartbeat"),
    ("down", "down", True, "PF 0000:6b:00.0 is down"),
    ("down and not alive", "down", False, "PF 0000:6b:00.0 is down"),
]


@pytest.mark.parametrize(
    ("state", "alive", "expected"), [row[1:] for row in VERDICTS], ids=[row[0] for row in VERDICTS]
)
def test_verdict(state: str | None, alive: bool | None, expected: str) -> None:
    assert verdict(physical(state=state), alive) == expected


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


async def test_rounds() -> None:
    answers, changes = Answers(), []
    pfs = [physical(), physical(OTHER)]
    monitor = HealthMonitor(cast("HelperClient", answers), lambda: pfs, 5, lambda: changes.append(1))

    await monitor.check()
    assert (monitor.unhealthy(), len(changes)) == ({}, 1)
    await monitor.check()
    assert len(changes) == 1, "nothing changed"

    answers.by_pf[PF] = False
    await monitor.check()
    assert monitor.unhealthy() == {PF: "PF 0000:6b:00.0 does not answer its heartbeat"}
    assert len(changes) == 2

    answers.by_pf[PF] = HelperUnavailableError("gone")
    answers.by_pf[OTHER] = HelperError(ErrorCode.BUSY, "an earlier one has not ended")
    await monitor.check()
    assert list(monitor.unhealthy()) == [PF], "while the helper is away, the last verdict stands"

    answers.by_pf[PF] = HelperError(ErrorCode.UNAVAILABLE, "no heartbeat file")
    await monitor.check()
    assert monitor.unhealthy() == {}, "a PF without a heartbeat has none held against it"

    answers.by_pf = {PF: True, OTHER: False}
    await monitor.check()
    assert list(monitor.unhealthy()) == [OTHER]
    pfs.pop()
    await monitor.check()
    assert monitor.unhealthy() == {}, "a PF that went away has no verdict"

    pfs[0] = physical(state="down")
    answers.asked.clear()
    await monitor.check()
    assert answers.asked == [], "a PF that is down has no firmware to ask"
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
