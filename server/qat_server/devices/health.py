"""Health of the PFs: the heartbeat (asked through the helper) and qat/state, as one verdict for each PF.

A verdict is "" (healthy, or nothing is known against it) or one sentence. A PF without a heartbeat file (older kernels)
has none held against it; while the helper is away, the last verdict stands. Each PF is asked by itself, again and
again: one that hangs holds up no other, and is unhealthy for it.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

from qat_server import logs
from qat_server.devices.inventory import PhysicalFunction
from qat_server.helper_client.client import HelperClient, HelperError, HelperSilentError, HelperUnavailableError
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress

log = logs.get(__name__)

FIRST_ANSWER: Final = 1.0
"""Seconds that a PF's VFs, when it is new, wait for its first answer before they are offered."""


def verdict(pf: PhysicalFunction, alive: bool | None, late: bool = False) -> str:
    """Why a PF's VFs must not be given out, "" when there is no reason. `alive` is None when no heartbeat is known.

    `late`: the query itself has not ended, so that the device does not answer at all.
    """
    if pf.state == "down":
        return f"PF {pf.address} is down"
    if late:
        return f"PF {pf.address} has not answered its heartbeat query"
    if alive is False:
        return f"PF {pf.address} does not answer its heartbeat"
    return ""


class HealthMonitor:
    """Asks each of `pfs` for its heartbeat every `interval` seconds (0: never); tells `on_change` of other answers."""

    def __init__(
        self,
        helper: HelperClient,
        pfs: Callable[[], Sequence[PhysicalFunction]],
        interval: float,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._helper = helper
        self._pfs = pfs
        self._interval = interval
        self._on_change = on_change
        self._clock = clock
        self._again = asyncio.Event()  # replaced each time: whoever waits for one is woken by it
        self._updated = asyncio.Event()
        self._asking: set[PciAddress] = set()
        self._judged: set[PciAddress] = set()
        self._since: dict[PciAddress, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.alive: dict[PciAddress, bool] = {}
        self._late: set[PciAddress] = set()
        self._silent: dict[PciAddress, str] = {}

    def unhealthy(self) -> dict[PciAddress, str]:
        """The PFs that are unhealthy, each with the reason."""
        verdicts = {pf.address: verdict(pf, self.alive.get(pf.address), pf.address in self._late) for pf in self._pfs()}
        return {address: reason for address, reason in verdicts.items() if reason}

    def update(self) -> None:
        """Take note that the PFs may have changed."""
        now, pfs = self._clock(), {pf.address: pf for pf in self._pfs()}
        self._since = {address: self._since.get(address, now) for address in pfs}
        self.alive = {address: alive for address, alive in self.alive.items() if address in pfs}
        # One that was down is new when it is up again.
        self._judged = {address for address in self._judged if address in pfs and pfs[address].state != "down"}
        self._late &= pfs.keys()
        self._updated.set()

    def missing(self) -> list[str]:
        """A sentence for each PF whose first answer is awaited."""
        return [f"PF {address} has not answered its heartbeat query" for address in sorted(self.pending())]

    def pending(self) -> set[PciAddress]:
        """The PFs whose first answer is to come, for a moment at most; `on_change` is called when that is over."""
        if not self._interval:
            return set()
        now = self._clock()
        waiting = {
            pf.address
            for pf in self._pfs()
            if pf.state != "down"
            and pf.address not in self._judged
            and now < self._since.get(pf.address, now) + FIRST_ANSWER
        }
        if waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FIRST_ANSWER, self._waited)
        return waiting

    def query_all(self) -> None:
        """Query every PF now: the helper is back."""
        before, self._again = self._again, asyncio.Event()
        before.set()

    def set_interval(self, seconds: float) -> None:
        """Ask so often from now on. What was last answered is forgotten with 0, since nobody looks any more."""
        if seconds == self._interval:
            return
        log.info("time between heartbeat queries", seconds=seconds)
        self._interval = seconds
        if not seconds:
            self.alive = {}
            self._late.clear()
            self._on_change()
        self._updated.set()
        self.query_all()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as rounds:
            while True:
                if self._interval:
                    for address in sorted({pf.address for pf in self._pfs()} - self._asking):
                        self._asking.add(address)
                        rounds.create_task(self._keep_asking(address))
                await self._updated.wait()
                self._updated.clear()

    async def _keep_asking(self, address: PciAddress) -> None:
        try:
            while self._interval and (pf := self._found(address)):
                again = self._again
                if pf.state != "down":  # a device that is down has no firmware to answer
                    await self.check(address)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval or None):
                        await again.wait()
        finally:
            self._asking.discard(address)

    async def check(self, address: PciAddress) -> None:
        """Ask one PF, and tell if the answer makes a difference."""
        before = (self.alive.get(address), address in self._late, address in self._judged)
        try:
            answer = await self._helper.heartbeat(address)
        except (HelperUnavailableError, HelperSilentError):
            pass  # that says nothing about the device
        except HelperError as error:
            self._no_answer(address, error)
        else:
            self._answered(address, answer.alive)
        self._judged.add(address)
        if self._found(address) and before != (self.alive.get(address), address in self._late, True):
            self._on_change()

    def _answered(self, address: PciAddress, alive: bool) -> None:
        if not self._interval or self._found(address) is None:
            return  # it is being changed, or has gone
        was_late = address in self._late
        self._late.discard(address)
        self._silent.pop(address, None)
        if was_late or self.alive.get(address) != alive:
            if not alive:
                log.error("heartbeat lost", pf=str(address))
            elif was_late or address in self.alive:
                log.info("heartbeat back", pf=str(address))
        self.alive[address] = alive

    def _no_answer(self, address: PciAddress, error: HelperError) -> None:
        if error.code == ErrorCode.UNAVAILABLE:  # this driver has none
            self.alive.pop(address, None)
            self._late.discard(address)
        elif error.code == ErrorCode.TIMED_OUT and self._found(address):
            # As long as that query has not ended, the next ones are answered with busy.
            self._late.add(address)
            self.alive[address] = False
        if self._silent.get(address) != error.message:
            self._silent[address] = error.message
            write = log.error if error.code == ErrorCode.TIMED_OUT else log.info
            write("no heartbeat to be read", pf=str(address), why=error.message)

    def _found(self, address: PciAddress) -> PhysicalFunction | None:
        return next((pf for pf in self._pfs() if pf.address == address), None)

    def _waited(self) -> None:
        self._timer = None
        self._on_change()
