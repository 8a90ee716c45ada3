"""Waiting for a condition, never for a length of time. The limits are generous: they only end a test that hangs."""

import asyncio
import time
from collections.abc import Callable

_POLL = 0.002


async def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Return once `condition()` is true, while the event loop runs. Raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(_POLL)


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Block until `condition()` is true: for tests of threads and processes. Raises TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not become true")
        time.sleep(_POLL)
