"""Holds the newest inventory of the node, which it reads from sysfs in a thread."""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from qat_server.devices.change_queue import ChangeQueue
from qat_server.devices.discovery import discover
from qat_server.devices.inventory import Inventory, no_vfs_hint
from qat_server.instrumentation.conditions import Conditions
from qat_server.instrumentation.counters import Counters
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError

_RETRY_FIRST: Final = 1.0
_RETRY_LAST: Final = 60.0
_EMPTY: Final = Inventory(pfs=(), vfs=(), cut=(), problems=())


class InventoryCache:
    """Each `refresh` replaces `current`. Devices that cannot be read are put into `queue` again with backoff."""

    def __init__(
        self,
        sysfs_root: Path,
        vf_drivers: Sequence[str],
        max_devices: int,
        queue: ChangeQueue,
        conditions: Conditions,
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sysfs_root = sysfs_root
        self._vf_drivers = vf_drivers
        self._max_devices = max_devices
        self._backoff = RescanBackoff(queue)
        self._conditions = conditions
        self._counters = counters
        self._clock = clock
        self.current = _EMPTY

    async def refresh(self, changed: frozenset[PciAddress] | None) -> None:
        """Read the devices named, or all for None. Raises SysfsError when the PCI bus cannot be read."""
        began = self._clock()
        known = None if self.current is _EMPTY else self.current
        try:
            self.current = await asyncio.to_thread(
                discover, self._sysfs_root, self._vf_drivers, self._max_devices, known, changed
            )
        except SysfsError as error:
            self._conditions.report("the PCI bus cannot be read", why=str(error))
            self._backoff.update([None])
            raise
        if changed is None:
            self._counters.resync()
        self._counters.rescan(self._clock() - began)
        self._backoff.update([problem.address for problem in self.current.problems])

    def report(self) -> None:
        """Report the conditions of the current inventory: devices with problems, devices cut off."""
        for problem in self.current.problems:
            self._conditions.report("device not usable", address=problem.address, why=problem.text)
        if cut := self.current.cut:
            self._conditions.report(
                "more VFs than --max-num-devices: the last in address order are left alone",
                max_num_devices=self._max_devices,
                left=len(cut),
                first=cut[0],
                last=cut[-1],
            )

    def report_no_vfs(self) -> None:
        """Report that there is nothing to serve."""
        pfs = len(self.current.pfs)
        self._conditions.report("no QAT VFs found", drivers=self._vf_drivers, pfs=pfs, hint=no_vfs_hint(pfs))


class RescanBackoff:
    """Rescans devices that could not be read: after one second, then after twice as long each time, up to a minute.

    No uevent reports that a device or the bus can be read again.
    """

    def __init__(self, queue: ChangeQueue) -> None:
        self._queue = queue
        self._pause = _RETRY_FIRST
        self._timer: asyncio.TimerHandle | None = None

    def update(self, unreadable: Collection[PciAddress | None]) -> None:
        """Replace the set of unreadable devices (None stands for the bus); an empty set resets the backoff."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not unreadable:
            self._pause = _RETRY_FIRST
            return
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._rescan, tuple(unreadable))

    def _rescan(self, unreadable: Collection[PciAddress | None]) -> None:
        self._timer = None
        self._pause = min(self._pause * 2, _RETRY_LAST)
        for address in unreadable:
            self._queue.rescan(address)
