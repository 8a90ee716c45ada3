"""The kubelet's ListAndWatch streams of one resource, as registration sees them."""

import asyncio
from collections.abc import Callable


class WatchStreams:
    """The kubelet's ListAndWatch streams of one resource: how many were opened and ended; a way to wait for a change.

    `fresh`: a stream was opened after the last one that ended. `on_opened` is called for each new stream, with whether
    another has ended before.
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
