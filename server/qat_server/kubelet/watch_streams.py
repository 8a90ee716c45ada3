"""The kubelet's ListAndWatch streams of one resource, as registration sees them: opened, ended, which came last."""

import asyncio
from collections.abc import Callable


class Streams:
    """How many ListAndWatch streams were opened and have ended, and a way to wait for the next such event.

    `fresh`: one was opened after the last one that ended.
    """

    def __init__(self, on_opened: Callable[[bool], None] = lambda _: None) -> None:
        self.opened = 0
        self.ended = 0
        self.fresh = False
        self._on_opened = on_opened
        self._event = asyncio.Event()

    async def change(self) -> None:
        """Return when a stream is opened or ends after this call."""
        self._event.clear()
        await self._event.wait()

    def open(self) -> None:
        self.opened += 1
        self.fresh = True
        self._event.set()
        self._on_opened(self.ended > 0)

    def end(self) -> None:
        self.ended += 1
        self.fresh = False
        self._event.set()
