"""The start as the service manager sees it: done when no device work is missing, or after PATIENCE.

Units that are ordered after this process (the kubelet) wait until then. So the wait is bounded: a device that cannot be
bound, or an absent helper, must not keep a node from its other work.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

from qat_server import logs
from qat_server.host.service_manager import ServiceManager
from qat_server.kubelet.device import Listing
from qat_shared import NAMESPACE

log = logs.get(__name__)

PATIENCE: Final = 20.0
"""Seconds after which the start counts as done whatever is missing. The unit's TimeoutStartSec= must be longer."""
_NAMED: Final = 3


class Startup:
    """`missing` returns what the start still waits for; each call of `check` asks it again."""

    def __init__(
        self,
        manager: ServiceManager,
        missing: Callable[[], Sequence[str]],
        listing: Callable[[], Listing],
        patience: float = PATIENCE,
    ) -> None:
        self._manager = manager
        self._missing = missing
        self._listing = listing
        self._patience = patience
        self._complete = asyncio.Event()

    def check(self) -> None:
        """See whether the start is complete: the devices have been reconciled."""
        if not self._complete.is_set() and not self._missing_sentence():
            self._complete.set()

    async def run(self) -> None:
        """Return once the service manager has been told that nothing is missing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                await self._complete.wait()
        if not self._complete.is_set() and (text := self._missing_sentence()):
            log.warning("start is done, but incomplete", seconds=self._patience, missing=text)
            await self._manager.ready(f"waited {self._patience:g} s, and went on without: {text}")
            await self._complete.wait()
        text = _devices(self._listing())
        log.info("start is done", devices=text)
        await self._manager.ready(f"started with {text}")

    def _missing_sentence(self) -> str:
        try:
            return _sentence(self._missing())
        except Exception as error:  # a defect must not keep other units waiting for ever
            log.exception("checking the start failed")
            return f"a defect of this server: {error!r}"


def _sentence(missing: Sequence[str]) -> str:
    more = len(missing) - _NAMED
    return "; ".join(missing[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _devices(listing: Listing) -> str:
    counts = [f"{sum(each.healthy for each in devices)} {NAMESPACE}/{name}" for name, devices in listing.items()]
    return ", ".join(counts) or "no devices"
