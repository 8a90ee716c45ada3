"""Binding operations under way: which VFs are being bound, which failed and when they are tried again.

One operation for one VF at a time, a bounded number in all; each failure is that VF's own, with backoff.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Final

from qat_server import logs
from qat_server.binding import apparmor
from qat_server.helper_client.backoff import Backoff, WakeUp
from qat_server.helper_client.client import HelperClient, HelperError, HelperUnavailableError
from qat_server.instrumentation.counters import Counters
from qat_shared.messages import DpdkDriver, ErrorCode
from qat_shared.pci import PciAddress

log = logs.get(__name__)

_AT_ONCE: Final = 16


class Binder:
    """Binds what it is told is wanted. `on_change` is called with each VF whose binding ended."""

    def __init__(
        self,
        helper: HelperClient,
        driver: DpdkDriver,
        counters: Counters,
        on_change: Callable[[PciAddress | None], None],
        sysfs_root: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._helper = helper
        self._driver = driver
        self._counters = counters
        self._on_change = on_change
        self._sysfs_root = sysfs_root
        self._clock = clock
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._running: set[PciAddress] = set()
        self._ended: set[PciAddress] = set()
        self._backoff = Backoff()
        self._wake_up = WakeUp(lambda: on_change(None), clock)
        self._wanted: set[PciAddress] = set()
        self._denied: set[PciAddress] = set()
        self.failures: dict[PciAddress, str] = {}
        self.late: set[PciAddress] = set()
        """Whose binding has outlasted the helper's patience and may still be under way: to be asked for again, wherever
        they seem to be bound."""

    def discovery_begins(self) -> None:
        """What ends from now on, the inventory that is being made may not know yet."""
        self._ended.clear()

    @property
    def unsettled(self) -> Set[PciAddress]:
        """Those whose driver, as the inventory has it, means nothing yet: their binding is under way, or had not ended
        when discovery began. (The kernel shows a driver's link before it asks the driver, which may then refuse.)"""
        return self._running | self._ended | self.late

    def reconcile(self, addresses: Iterable[PciAddress], work: asyncio.TaskGroup) -> None:
        """Bind these VFs, in tasks of `work`, as far as they are due; forget the failures of all other settled VFs."""
        wanted = self._wanted = set(addresses)
        kept = wanted | self.unsettled
        self._denied &= kept
        self._backoff = self._backoff.keep(kept)
        self.failures = {address: why for address, why in self.failures.items() if address in kept}
        if not self._helper.connected:
            return  # a look is asked for when it is back
        now = self._clock()
        for address in sorted(wanted - self._running - self._ended):
            if self._backoff.due(address, now):
                self._running.add(address)
                work.create_task(self._bind(address))
        self._wake_up.at(self._backoff.next_due(now))

    def missing(self) -> list[str]:
        """The VFs that are to be bound yet, in words: without those that the helper's policy keeps from it."""
        unbound = sorted((self._wanted | self.unsettled) - self._denied)
        return [f"VF {address} is not bound: {self.failures.get(address, 'under way')}" for address in unbound]

    async def _bind(self, address: PciAddress) -> None:
        try:
            async with self._slots:
                began = self._clock()
                outcome = ""
                try:
                    bound = await self._helper.bind(address, self._driver, "serve it to pods")
                except HelperUnavailableError as error:
                    outcome = error.code
                    return
                except HelperError as error:
                    outcome = error.code
                    self._failed(address, error)
                except Exception as error:  # a defect must not end what the others are served by
                    log.exception("binding failed", address=address)
                    outcome = ErrorCode.INTERNAL
                    self._failed(address, HelperError(ErrorCode.INTERNAL, f"a defect of this server: {error!r}"))
                else:
                    outcome = "ok"
                    self._backoff = self._backoff.without(address)
                    self.failures.pop(address, None)
                    self.late.discard(address)
                    log.info("VF bound", address=address, driver=bound.driver)
                finally:
                    if outcome:  # not cancelled
                        self._counters.bind(self._driver, self._clock() - began, outcome)
        finally:
            self._running.discard(address)
            self._ended.add(address)  # a look at it follows
            self._on_change(address)

    def _failed(self, address: PciAddress, error: HelperError) -> None:
        self._backoff = self._backoff.failed(address, self._clock())
        if error.code is ErrorCode.DENIED:
            self._denied.add(address)
        if error.code is ErrorCode.TIMED_OUT:
            self.late.add(address)
        elif error.code is not ErrorCode.BUSY:  # as the helper answers while an earlier operation goes on
            self.late.discard(address)
        if self.failures.get(address) != error.message:
            advice = apparmor.read_apparmor(self._sysfs_root).advice(error.errno)
            more = {"advice": advice} if advice else {}
            log.error("VF not bound", address=address, code=error.code, why=error.message, **more)
        self.failures[address] = error.message
