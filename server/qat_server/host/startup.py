"""The start as the service manager sees it: done when nothing is missing of the devices, or when it took too long.

Whoever is ordered after this process (the kubelet) waits until then. So it is never for long: a device that cannot be
bound, or a helper that is not there, must not keep a node from its other work.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

from qat_server import logs
from qat_server.devices.inventory import Listing
from qat_server.host.service_manager import ServiceManager
from qat_shared import NAMESPACE

log = logs.get(__name__)

PATIENCE: Final = 20.0
"""Seconds after which the start counts as done whatever is missing. The unit's TimeoutStartSec= must be longer."""
_NAMED: Final = 3


class Start:
    """`missing` says what is not there yet; it is asked again whenever `looked` is called."""

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

    def looked(self) -> None:
        """The devices were looked at."""
        if not self._complete.is_set() and not self._what_is_missing():
            self._complete.set()

    async def run(self) -> None:
        """Until the service manager knows that nothing is missing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                await self._complete.wait()
        if not self._complete.is_set() and (text := self._what_is_missing()):
            log.warning("start is done, though not all is there", seconds=self._patience, missing=text)
            await self._manager.ready(f"waited {self._patience:g} s, and went on without: {text}")
            await self._complete.wait()
        text = _devices(self._listing())
        log.info("start is done", devices=text)
        await self._manager.ready(f"started with {text}")

    def _what_is_missing(self) -> str:
        try:
            return _sentence(self._missing())
        except Exception as error:  # whoever waits must not wait for ever because of a defect
            log.exception("what is missing could not be told")
            return f"something that a defect keeps from being told: {error!r}"


def _sentence(missing: Sequence[str]) -> str:
    more = len(missing) - _NAMED
    return "; ".join(missing[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _devices(listing: Listing) -> str:
    counts = [f"{sum(each.healthy for each in devices)} {NAMESPACE}/{name}" for name, devices in listing.items()]
    return ", ".join(counts) or "no devices"
