"""Which VFs are open now, for /status and /metrics: read in a thread, at most once a second.

Opening or closing a device gives no uevent, so /status and /metrics have to read it: one file for each VF, some 50 ms
for a thousand.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from qat_server.devices.function_reader import READ_ERRORS, read_in_use
from qat_server.devices.inventory import Inventory
from qat_shared.messages import DpdkDriver
from qat_shared.sysfs import open_device

MAX_AGE: Final = 1.0
"""Seconds for which one reading answers every request."""


def with_open_vfs(sysfs_root: Path, inventory: Inventory) -> Inventory:
    """The inventory with `in_use` of each VF read again; a VF that cannot be read keeps its value."""
    vfs = []
    for vf in inventory.vfs:
        if vf.driver == DpdkDriver.VFIO_PCI:
            try:
                with open_device(sysfs_root, vf.address) as device:
                    in_use = read_in_use(device)
            except READ_ERRORS:
                in_use = bool(vf.in_use)
            vfs.append(vf if in_use == vf.in_use else replace(vf, in_use=in_use))
        else:
            vfs.append(vf)
    return replace(inventory, vfs=tuple(vfs))


class OpenVfs:
    """A cache of one reading. Requests during a reading share its result."""

    def __init__(
        self,
        sysfs_root: Path,
        clock: Callable[[], float] = time.monotonic,
        read: Callable[[Path, Inventory], Inventory] = with_open_vfs,
    ) -> None:
        self._sysfs_root = sysfs_root
        self._clock = clock
        self._read = read
        self._lock = asyncio.Lock()
        self._source: Inventory | None = None
        self._result: Inventory | None = None
        self._read_at = 0.0

    async def refreshed(self, inventory: Inventory) -> Inventory:
        """The inventory with `in_use` at most MAX_AGE seconds old."""
        async with self._lock:
            if self._result is None or self._source is not inventory or self._clock() >= self._read_at + MAX_AGE:
                self._result = await asyncio.to_thread(self._read, self._sysfs_root, inventory)
                self._source, self._read_at = inventory, self._clock()
            return self._result
