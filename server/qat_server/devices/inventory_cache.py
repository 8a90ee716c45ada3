"""Holds the newest inventory of the node, which it reads from sysfs in a thread."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from qat_server.devices.change_queue import ChangeQueue, RescanBackoff
from qat_server.devices.discovery import discover
from qat_server.devices.inventory import Inventory, no_vfs_hint
from qat_server.instrumentation.conditions import Conditions
from qat_server.instrumentation.counters import Counters
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError

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
