"""When the start counts as done: with nothing missing, or after a timeout, with the reasons why it is incomplete."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

from qat_server.host.service_manager import ServiceManager
from qat_server.host.startup import Startup
from qat_server.kubelet.device import Device, Listing, summary
from qat_shared.pci import PciAddress
from support.conditions import until

VFS = [PciAddress.parse(f"0000:6b:00.{number}") for number in (1, 2)]
LISTING: Listing = {
    "cy": tuple(Device(vf, None, None, (), ()) for vf in VFS),
    "dc": (Device(PciAddress.parse("0000:70:00.1"), None, None, (), (), reason="its PF is down"),),
}
NEVER = 3600.0


class Manager:
    def __init__(self) -> None:
        self.statuses: list[str] = []

    async def ready(self, status: str) -> None:
        self.statuses.append(status)


class Bench:
    def __init__(self, timeout: float) -> None:
        self.missing: Sequence[str] = ("the helper is not connected yet",)
        self.listing: Listing = {}
        self.manager = Manager()
        self.checks = 0
        self.start = Startup(cast(ServiceManager, self.manager), self._missing, lambda: summary(self.listing), timeout)

    def _missing(self) -> Sequence[str]:
        self.checks += 1
        return self.missing


@asynccontextmanager
async def started(start_timeout: float) -> AsyncIterator[Bench]:
    bench = Bench(start_timeout)
    task = asyncio.create_task(bench.start.run())
    try:
        yield bench
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_start_is_complete_once_nothing_is_missing_and_is_notified_once() -> None:
    async with started(NEVER) as bench:
        for _ in range(3):
            bench.start.check()
            await asyncio.sleep(0)
        assert bench.manager.statuses == []
        bench.missing, bench.listing = (), LISTING
        bench.start.check()
        await until(lambda: bench.manager.statuses)
        checks = bench.checks
        bench.missing = ("the helper has gone",)
        bench.start.check()
        await asyncio.sleep(0)
        assert bench.manager.statuses == ["started with 2 qat.intel.com/cy, 0 qat.intel.com/dc"]
        assert bench.checks == checks, "the start is over, so later changes do not matter"


async def test_the_reasons_are_read_again_at_the_timeout() -> None:
    async with started(0.0) as bench:
        bench.missing, bench.listing = (), LISTING
        await until(lambda: bench.manager.statuses)
        assert bench.manager.statuses == ["started with 2 qat.intel.com/cy, 0 qat.intel.com/dc"]


async def test_a_defect_does_not_block_the_start() -> None:
    def defect() -> Sequence[str]:
        raise ZeroDivisionError

    manager = Manager()
    task = asyncio.create_task(Startup(cast(ServiceManager, manager), defect, str, 0.0).run())
    await until(lambda: manager.statuses)
    assert "ZeroDivisionError" in manager.statuses[0]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_after_the_timeout_the_reasons_are_notified_and_later_the_completion() -> None:
    async with started(0.0) as bench:
        bench.missing = tuple(f"VF 0000:6b:00.{number} is not bound: busy" for number in range(5))
        await until(lambda: bench.manager.statuses)
        (status,) = bench.manager.statuses
        assert status == (
            "waited 0 s, and went on without: VF 0000:6b:00.0 is not bound: busy; VF 0000:6b:00.1 is not bound: busy;"
            " VF 0000:6b:00.2 is not bound: busy; and 2 more"
        )
        bench.start.check()
        bench.missing = ()
        bench.start.check()
        await until(lambda: len(bench.manager.statuses) == 2)
        assert bench.manager.statuses[1] == "started with no devices"
