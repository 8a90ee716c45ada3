"""The kubelet's ListAndWatch streams of one resource, as registration sees them."""

import asyncio
from collections.abc import Callable


class WatchStreams:
    """Counts the streams that were opened and that have ended, and lets a caller wait for the next change.

    `fresh`: a stream was opened after the last one ended. `on_opened` is called for each new stream; its argument is
    whether any stream has ended before.
    """

    def __init__(self, on_opened: Callable[[bool], None] = lambda _: None) -> None:
        self.opened = 0
        self.ended = 0
        self.fresh = False
        self._on_opened = on_opened
        self._changed = asyncio.Event()

    async def wait_for_change(self) -> None:
        """Return when a stream opens or ends after this call."""
        self._changed.clear()
        await self._changed.wait()

    def open(self) -> None:
        self.opened += 1
        self.fresh = True
        self._changed.set()
        self._on_opened(self.ended > 0)

    def end(self) -> None:
        self.ended += 1
        self.fresh = False
        self._changed.set()
