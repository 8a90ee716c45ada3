"""The queue of changes that wakes the run loop: devices to read again, or only a reconcile of what is known.

Uevents, the resync timer, health, usage and finished operations add to it. A burst comes out as one change.
"""

import asyncio
from typing import Final

from qat_shared.pci import PciAddress

_COALESCE: Final = 0.005  # seconds in which a burst is gathered
_COALESCE_MOST: Final = 0.1
_SHARE: Final = 3  # a burst is gathered for this many times the last reconcile's length: 20 ms with a thousand VFs


class ChangeQueue:
    """Changes that wait for the next reconcile."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._devices: set[PciAddress] = set()
        self._everything = False
        self._taken_at: float | None = None

    @property
    def pending(self) -> bool:
        """Whether a change waits that `next` has not taken yet."""
        return self._event.is_set()

    def rescan(self, address: PciAddress | None = None) -> None:
        """Request that one device, or without an address every device, is read again."""
        if address is None:
            self._everything = True
        else:
            self._devices.add(address)
        self._event.set()

    def reconcile(self) -> None:
        """Request a reconcile of the known inventory; no device is read again."""
        self._event.set()

    def rescan_or_reconcile(self, address: PciAddress | None) -> None:
        """`rescan` a device, or `reconcile` without one."""
        if address is None:
            self.reconcile()
        else:
            self.rescan(address)

    def unfinished(self) -> list[str]:
        """A sentence while a change waits."""
        return ["devices have changed and are being read again"] if self.pending else []

    async def next(self) -> frozenset[PciAddress] | None:
        """The devices to read again, once there is a change; None for every device, empty for none."""
        loop = asyncio.get_running_loop()
        took = 0.0 if self._taken_at is None else loop.time() - self._taken_at
        await self._event.wait()
        await asyncio.sleep(min(max(_COALESCE, took * _SHARE), _COALESCE_MOST))
        devices = None if self._everything else frozenset(self._devices)
        self._devices.clear()
        self._everything = False
        self._event.clear()
        self._taken_at = loop.time()
        return devices

    async def resync(self, interval: float) -> None:
        """Rescan every device each `interval` seconds: some changes give no uevent (qat/state, for one)."""
        while True:
            await asyncio.sleep(interval)
            self.rescan()
