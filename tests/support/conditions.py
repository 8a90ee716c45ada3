"""Waiting for conditions in tests, never for times."""

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Return once `condition()` is true; TimeoutError when it is not within a generous limit."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
