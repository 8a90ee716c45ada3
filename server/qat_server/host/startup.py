"""The start as the service manager sees it: complete when no work on devices is unfinished, or after START_TIMEOUT.

Units that are ordered after this process (the kubelet) wait until then. The wait is bounded, because a device that
cannot be bound or an absent helper must not keep the node from its other work.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

from qat_server import logs
from qat_server.host.service_manager import ServiceManager

log = logs.get(__name__)

START_TIMEOUT: Final = 20.0
"""Seconds after which the start counts as complete in any case. The unit's TimeoutStartSec= must be longer."""
_MAX_REASONS: Final = 3


class Startup:
    """Reports the start to `manager`. `unfinished` returns why it is not complete, `summary` what is served."""

    def __init__(
        self,
        manager: ServiceManager,
        unfinished: Callable[[], Sequence[str]],
        summary: Callable[[], str],
        timeout: float = START_TIMEOUT,
    ) -> None:
        self._manager = manager
        self._unfinished = unfinished
        self._summary = summary
        self._timeout = timeout
        self._complete = asyncio.Event()

    def check(self) -> None:
        """Check again whether the start is complete. Call it after each reconcile."""
        if not self._complete.is_set() and not self._unfinished_text():
            self._complete.set()

    async def run(self) -> None:
        """Return once the service manager has been notified that nothing is unfinished."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                await self._complete.wait()
        if not self._complete.is_set() and (text := self._unfinished_text()):
            log.warning("start is incomplete after the timeout", seconds=self._timeout, missing=text)
            await self._manager.ready(f"waited {self._timeout:g} s, and went on without: {text}")
            await self._complete.wait()
        text = self._summary()
        log.info("start is complete", devices=text)
        await self._manager.ready(f"started with {text}")

    def _unfinished_text(self) -> str:
        try:
            return _joined(self._unfinished())
        except Exception as error:  # a defect must not block other units for ever
            log.exception("checking the start failed")
            return f"a defect of this server: {error!r}"


def _joined(reasons: Sequence[str]) -> str:
    more = len(reasons) - _MAX_REASONS
    return "; ".join(reasons[:_MAX_REASONS]) + (f"; and {more} more" if more > 0 else "")
