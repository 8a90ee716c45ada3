"""Reads the dev_cfg texts that some resource names depend on; naming.py makes the names.

Some PFs do not show their services in sysfs. Their dev_cfg is read through the helper, in tasks of their own, since a
helper that does not answer must delay nothing else.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from qat_server import logs
from qat_server.devices import naming
from qat_server.devices.inventory import Inventory
from qat_server.helper_client.backoff import Backoff, WakeUp
from qat_server.helper_client.client import HelperClient, HelperError, HelperUnavailableError
from qat_server.instrumentation.conditions import Conditions
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress

log = logs.get(__name__)

_NO_CONFIG: Final = (ErrorCode.UNAVAILABLE, ErrorCode.DENIED)
"""The driver has no dev_cfg, or the helper's policy forbids reading it."""


class DevCfgReader:
    """`texts` has the dev_cfg by PF, "" for none. `on_change` is called when one changes or a retry is due."""

    def __init__(
        self, helper: HelperClient, on_change: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._helper = helper
        self._on_change = on_change
        self._clock = clock
        self._needed: set[PciAddress] = set()
        self.texts: dict[PciAddress, str] = {}
        self._failures: dict[PciAddress, str] = {}
        self._reading: set[PciAddress] = set()
        self._backoff = Backoff()
        self._wake_up = WakeUp(on_change, clock)

    def reconcile(self, inventory: Inventory, conditions: Conditions, work: asyncio.TaskGroup) -> None:
        """Start reading each dev_cfg that is needed and not known, in tasks of `work`; forget those not needed."""
        needed = self._needed = {pf.address for pf in inventory.pfs if naming.needs_config(pf)}
        self.texts = {address: text for address, text in self.texts.items() if address in needed}
        self._failures = {address: why for address, why in self._failures.items() if address in needed}
        self._backoff = self._backoff.keep(needed)
        for address, why in self._failures.items():
            conditions.report("services not read", address=address, why=why)
        if not self._helper.connected:
            return  # a new connection leads to a reconcile
        now = self._clock()
        for address in sorted(needed - self.texts.keys() - self._reading):
            if self._backoff.due(address, now):
                self._reading.add(address)
                work.create_task(self._read(address))
        self._wake_up.at(self._backoff.next_due(now))

    def unfinished(self) -> list[str]:
        """A sentence for each PF whose services have not been read yet."""
        unread = sorted(self._needed - self.texts.keys())
        return [f"PF {address}: {self._failures.get(address, 'its services are being read')}" for address in unread]

    async def _read(self, address: PciAddress) -> None:
        try:
            self.texts[address] = (await self._helper.device_config(address)).text
            self._failures.pop(address, None)
        except HelperUnavailableError:
            return
        except HelperError as error:
            if error.code in _NO_CONFIG:
                self.texts[address] = ""
            else:
                self._backoff = self._backoff.failed(address, self._clock())
                self._failures[address] = error.message
        finally:
            self._reading.discard(address)
            self._on_change()
