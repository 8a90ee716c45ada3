"""The binding operations in progress, their failures, and the time of each retry."""

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

_MAX_CONCURRENT: Final = 16


class Binder:
    """Binds VFs through the helper. `on_change` is called with each VF whose operation ended, or None for a retry.

    `failures` has the last error by VF. `timed_out` are the VFs whose operation took longer than the helper waits and
    may still be in progress: they have to be bound again, whichever driver they seem to have.
    """

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
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)
        self._running: set[PciAddress] = set()
        self._ended_since_discovery: set[PciAddress] = set()
        self._backoff = Backoff()
        self._wake_up = WakeUp(lambda: on_change(None), clock)
        self._wanted: set[PciAddress] = set()
        self._denied: set[PciAddress] = set()
        self.failures: dict[PciAddress, str] = {}
        self.timed_out: set[PciAddress] = set()

    def discovery_started(self) -> None:
        """Note that the next inventory may not show the result of operations that end from now on."""
        self._ended_since_discovery.clear()

    @property
    def pending(self) -> Set[PciAddress]:
        """The VFs whose driver in the inventory cannot be relied on yet.

        Their operation is in progress, or had not ended when discovery began. (The kernel shows the link to a driver
        before it calls the driver, which may then refuse the device.)
        """
        return self._running | self._ended_since_discovery | self.timed_out

    def reconcile(self, addresses: Iterable[PciAddress], work: asyncio.TaskGroup) -> None:
        """Start to bind those of these VFs that are due, in tasks of `work`.

        Forget the failures of all other VFs that are not pending.
        """
        wanted = self._wanted = set(addresses)
        kept = wanted | self.pending
        self._denied &= kept
        self._backoff = self._backoff.keep(kept)
        self.failures = {address: why for address, why in self.failures.items() if address in kept}
        if not self._helper.connected:
            return  # a new connection leads to a reconcile
        now = self._clock()
        for address in sorted(wanted - self._running - self._ended_since_discovery):
            if self._backoff.due(address, now):
                self._running.add(address)
                work.create_task(self._bind(address))
        self._wake_up.at(self._backoff.next_due(now))

    def unfinished(self) -> list[str]:
        """One sentence for each VF that is not bound yet, except those that the helper's policy denies."""
        unbound = sorted((self._wanted | self.pending) - self._denied)
        return [f"VF {address} is not bound: {self.failures.get(address, 'in progress')}" for address in unbound]

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
                except Exception as error:  # a defect must not end the task group, which serves the other VFs
                    log.exception("binding failed because of a defect", address=address)
                    outcome = ErrorCode.INTERNAL
                    self._failed(address, HelperError(ErrorCode.INTERNAL, f"a defect of this server: {error!r}"))
                else:
                    outcome = "ok"
                    self._backoff = self._backoff.without(address)
                    self.failures.pop(address, None)
                    self.timed_out.discard(address)
                    log.info("VF bound", address=address, driver=bound.driver)
                finally:
                    if outcome:  # not cancelled
                        self._counters.bind(self._driver, self._clock() - began, outcome)
        finally:
            self._running.discard(address)
            self._ended_since_discovery.add(address)  # on_change leads to a discovery of it
            self._on_change(address)

    def _failed(self, address: PciAddress, error: HelperError) -> None:
        self._backoff = self._backoff.failed(address, self._clock())
        if error.code is ErrorCode.DENIED:
            self._denied.add(address)
        if error.code is ErrorCode.TIMED_OUT:
            self.timed_out.add(address)
        elif error.code is not ErrorCode.BUSY:  # the helper's answer while an earlier operation is in progress
            self.timed_out.discard(address)
        if self.failures.get(address) != error.message:
            advice = apparmor.read_apparmor(self._sysfs_root).advice(error.errno)
            more = {"advice": advice} if advice else {}
            log.error("VF not bound", address=address, code=error.code, why=error.message, **more)
        self.failures[address] = error.message
