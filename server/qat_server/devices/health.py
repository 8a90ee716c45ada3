"""Health of the PFs, from their heartbeat (queried through the helper) and qat/state.

A PF without a heartbeat file (older kernels) counts as healthy. While the helper is away, the last result of each PF
stays. Each PF is queried in a task of its own, so a query that hangs delays no other PF; its own PF becomes unhealthy.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

from qat_server import logs
from qat_server.devices.inventory import PhysicalFunction
from qat_server.helper_client.client import (
    HelperClient,
    HelperError,
    HelperNotRespondingError,
    HelperUnavailableError,
)
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress

log = logs.get(__name__)

FIRST_RESULT_WAIT: Final = 1.0
"""Seconds for which the VFs of a new PF are withheld while its first query has no result."""


def unhealthy_reason(pf: PhysicalFunction, alive: bool | None, timed_out: bool = False) -> str:
    """Why a PF's VFs must not be allocated, "" for a healthy PF. `alive` is None when no heartbeat is known.

    `timed_out`: the heartbeat query itself has not ended, so the device does not react at all.
    """
    if pf.state == "down":
        return f"PF {pf.address} is down"
    if timed_out:
        return f"PF {pf.address} has not answered its heartbeat query"
    if alive is False:
        return f"PF {pf.address} does not answer its heartbeat"
    return ""


class HealthMonitor:
    """Queries the heartbeat of each of `pfs` every `interval` seconds (0: never).

    `on_change` is called when a result differs from the one before. `heartbeats` has the last result by PF.
    """

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
        self._query_now = asyncio.Event()  # replaced when set, so that it wakes exactly those that wait for it
        self._updated = asyncio.Event()
        self._polled: set[PciAddress] = set()
        self._queried: set[PciAddress] = set()
        self._first_seen: dict[PciAddress, float] = {}
        self._pending_timer: asyncio.TimerHandle | None = None
        self.heartbeats: dict[PciAddress, bool] = {}
        self._timed_out: set[PciAddress] = set()
        self._logged_errors: dict[PciAddress, str] = {}

    def unhealthy(self) -> dict[PciAddress, str]:
        """The reason by unhealthy PF."""
        reasons = {
            pf.address: unhealthy_reason(pf, self.heartbeats.get(pf.address), pf.address in self._timed_out)
            for pf in self._pfs()
        }
        return {address: reason for address, reason in reasons.items() if reason}

    def update(self) -> None:
        """Forget PFs that have gone, and begin to query new ones. Call it after each discovery."""
        now, pfs = self._clock(), {pf.address: pf for pf in self._pfs()}
        self._first_seen = {address: self._first_seen.get(address, now) for address in pfs}
        self.heartbeats = {address: alive for address, alive in self.heartbeats.items() if address in pfs}
        # A PF that was down counts as new when it is up again.
        self._queried = {address for address in self._queried if address in pfs and pfs[address].state != "down"}
        self._timed_out &= pfs.keys()
        self._updated.set()

    def unfinished(self) -> list[str]:
        """One sentence for each PF whose first result is pending."""
        return [f"PF {address} has not answered its heartbeat query" for address in sorted(self.pending())]

    def pending(self) -> set[PciAddress]:
        """The PFs without a first result, each for FIRST_RESULT_WAIT at most. `on_change` is called after that time."""
        if not self._interval:
            return set()
        now = self._clock()
        pending = {
            pf.address
            for pf in self._pfs()
            if pf.state != "down"
            and pf.address not in self._queried
            and now < self._first_seen.get(pf.address, now) + FIRST_RESULT_WAIT
        }
        if pending and self._pending_timer is None:
            self._pending_timer = asyncio.get_running_loop().call_later(FIRST_RESULT_WAIT, self._pending_expired)
        return pending

    def query_all(self) -> None:
        """Query every PF now, since the helper is back."""
        before, self._query_now = self._query_now, asyncio.Event()
        before.set()

    def set_interval(self, seconds: float) -> None:
        """Replace the interval. With 0, past results are dropped, since no query would correct them."""
        if seconds == self._interval:
            return
        log.info("heartbeat interval changed", seconds=seconds)
        self._interval = seconds
        if not seconds:
            self.heartbeats = {}
            self._timed_out.clear()
            self._on_change()
        self._updated.set()
        self.query_all()

    async def run(self) -> None:
        """Query until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                if self._interval:
                    for address in sorted({pf.address for pf in self._pfs()} - self._polled):
                        self._polled.add(address)
                        tasks.create_task(self._poll(address))
                await self._updated.wait()
                self._updated.clear()

    async def _poll(self, address: PciAddress) -> None:
        try:
            while self._interval and (pf := self._pf(address)):
                query_now = self._query_now
                if pf.state != "down":  # a device that is down has no firmware to answer
                    await self.query(address)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval or None):
                        await query_now.wait()
        finally:
            self._polled.discard(address)

    async def query(self, address: PciAddress) -> None:
        """Query one PF, and call `on_change` if the result differs from the one before."""
        before = (self.heartbeats.get(address), address in self._timed_out, address in self._queried)
        try:
            heartbeat = await self._helper.heartbeat(address)
        except (HelperUnavailableError, HelperNotRespondingError):
            pass  # a failure of the helper, which shows nothing about the device
        except HelperError as error:
            self._failed(address, error)
        else:
            self._answered(address, heartbeat.alive)
        self._queried.add(address)
        if self._pf(address) and before != (self.heartbeats.get(address), address in self._timed_out, True):
            self._on_change()

    def _answered(self, address: PciAddress, alive: bool) -> None:
        if not self._interval or self._pf(address) is None:
            return  # queries have been turned off, or the PF is being changed or has gone
        timed_out_before = address in self._timed_out
        self._timed_out.discard(address)
        self._logged_errors.pop(address, None)
        if timed_out_before or self.heartbeats.get(address) != alive:
            if not alive:
                log.error("heartbeat lost", pf=str(address))
            elif timed_out_before or address in self.heartbeats:
                log.info("heartbeat back", pf=str(address))
        self.heartbeats[address] = alive

    def _failed(self, address: PciAddress, error: HelperError) -> None:
        if error.code == ErrorCode.UNAVAILABLE:  # this driver has no heartbeat
            self.heartbeats.pop(address, None)
            self._timed_out.discard(address)
        elif error.code == ErrorCode.TIMED_OUT and self._pf(address):
            # Until that query ends, the helper refuses further ones as busy.
            self._timed_out.add(address)
            self.heartbeats[address] = False
        if self._logged_errors.get(address) != error.message:
            self._logged_errors[address] = error.message
            write = log.error if error.code == ErrorCode.TIMED_OUT else log.info
            write("heartbeat cannot be read", pf=str(address), why=error.message)

    def _pf(self, address: PciAddress) -> PhysicalFunction | None:
        return next((pf for pf in self._pfs() if pf.address == address), None)

    def _pending_expired(self) -> None:
        self._pending_timer = None
        self._on_change()
