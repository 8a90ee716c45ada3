"""Health of the PFs: the heartbeat (asked through the helper) and qat/state, as one verdict for each PF.

A verdict is "" (healthy, or nothing is known against it) or one sentence. A PF without a heartbeat file (older kernels)
has none held against it; while the helper is away, the last verdict stands.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from qat_server import logs
from qat_server.helper_client import HelperClient, HelperError, HelperUnavailableError
from qat_server.inventory import PhysicalFunction
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress

log = logs.get(__name__)


def verdict(pf: PhysicalFunction, alive: bool | None) -> str:
    """Why a PF's VFs must not be given out, "" when there is no reason. `alive` is None when no heartbeat is known."""
    if pf.state == "down":
        return f"PF {pf.address} is down"
    if alive is False:
        return f"PF {pf.address} does not answer its heartbeat"
    return ""


class HealthMonitor:
    """Asks for the heartbeats every `interval` seconds (0: never), and tells `on_change` when an answer differs."""

    def __init__(
        self,
        helper: HelperClient,
        pfs: Callable[[], Sequence[PhysicalFunction]],
        interval: float,
        on_change: Callable[[], None],
    ) -> None:
        self._helper = helper
        self._pfs = pfs
        self._interval = interval
        self._set = asyncio.Event()
        self._on_change = on_change
        self.alive: dict[PciAddress, bool] = {}
        self._silent: dict[PciAddress, str] = {}

    def unhealthy(self) -> dict[PciAddress, str]:
        """The PFs that are unhealthy, each with the reason."""
        verdicts = {pf.address: verdict(pf, self.alive.get(pf.address)) for pf in self._pfs()}
        return {address: reason for address, reason in verdicts.items() if reason}

    def set_interval(self, seconds: float) -> None:
        """Ask so often from now on. What was last answered is forgotten with 0, since nobody looks any more."""
        if seconds == self._interval:
            return
        log.info("time between heartbeat queries", seconds=seconds)
        self._interval = seconds
        if not seconds:
            self.alive = {}
            self._on_change()
        self._set.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._set.clear()
            if self._interval:
                await self.check()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval or None):
                    await self._set.wait()

    async def check(self) -> None:
        """One round: all PFs side by side, each by itself."""
        pfs = self._pfs()
        self.alive = {pf.address: self.alive[pf.address] for pf in pfs if pf.address in self.alive}
        before = dict(self.alive)
        async with asyncio.TaskGroup() as group:
            for pf in pfs:
                if pf.state != "down":  # a device that is down has no firmware to answer
                    group.create_task(self._ask(pf.address))
        if self.alive != before:
            self._on_change()

    async def _ask(self, address: PciAddress) -> None:
        try:
            answer = await self._helper.heartbeat(address)
        except HelperUnavailableError:
            return
        except HelperError as error:
            if error.code == ErrorCode.UNAVAILABLE:
                self.alive.pop(address, None)
            if self._silent.get(address) != error.message:
                self._silent[address] = error.message
                log.info("no heartbeat to be read", pf=str(address), why=error.message)
            return
        if not self._interval:
            return  # was set while the helper was asked
        self._silent.pop(address, None)
        if self.alive.get(address) != answer.alive:
            if not answer.alive:
                log.error("heartbeat lost", pf=str(address))
            elif address in self.alive:
                log.info("heartbeat back", pf=str(address))
        self.alive[address] = answer.alive
