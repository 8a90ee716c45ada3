"""The resource name of each VF, from its PF's services.

Some PFs do not show their services in sysfs. Their dev_cfg is read through the helper, each in a task of its own, so
that a slow helper delays nothing else. Until it has been read, the PF's VFs have no name.
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


class ResourceNames:
    """Reads the dev_cfg that names depend on. `on_change` is called when names may differ or a retry is due."""

    def __init__(
        self, helper: HelperClient, on_change: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._helper = helper
        self._on_change = on_change
        self._clock = clock
        self._needed: set[PciAddress] = set()
        self._configs: dict[PciAddress, str] = {}
        self._failures: dict[PciAddress, str] = {}
        self._reading: set[PciAddress] = set()
        self._backoff = Backoff()
        self._wake_up = WakeUp(on_change, clock)

    def reconcile(self, inventory: Inventory, conditions: Conditions, work: asyncio.TaskGroup) -> None:
        """Start reading each dev_cfg that is needed and not known, in tasks of `work`; forget those not needed."""
        needed = self._needed = {pf.address for pf in inventory.pfs if naming.needs_config(pf)}
        self._configs = {address: text for address, text in self._configs.items() if address in needed}
        self._failures = {address: why for address, why in self._failures.items() if address in needed}
        self._backoff = self._backoff.keep(needed)
        for address, why in self._failures.items():
            conditions.report("services not read", address=address, why=why)
        if not self._helper.connected:
            return  # a new connection leads to a reconcile
        now = self._clock()
        for address in sorted(needed - self._configs.keys() - self._reading):
            if self._backoff.due(address, now):
                self._reading.add(address)
                work.create_task(self._read(address))
        self._wake_up.at(self._backoff.next_due(now))

    def of(self, inventory: Inventory) -> dict[PciAddress, str]:
        """Resource name by VF. A VF is left out while its PF's dev_cfg is needed and has not been read."""
        pfs = {pf.address: pf for pf in inventory.pfs}
        names = {}
        for vf in inventory.vfs:
            pf = pfs.get(vf.pf) if vf.pf is not None else None
            config = self._configs.get(pf.address) if pf is not None else None
            if config is not None or pf is None or not naming.needs_config(pf):
                names[vf.address] = naming.resource_name(vf, pf, config)
        return names

    def missing(self) -> list[str]:
        """A sentence for each PF whose services have not been read yet."""
        unread = sorted(self._needed - self._configs.keys())
        return [f"PF {address}: {self._failures.get(address, 'its services are being read')}" for address in unread]

    async def _read(self, address: PciAddress) -> None:
        try:
            self._configs[address] = (await self._helper.device_config(address)).text
            self._failures.pop(address, None)
        except HelperUnavailableError:
            return
        except HelperError as error:
            if error.code in _NO_CONFIG:
                self._configs[address] = ""
            else:
                self._backoff = self._backoff.failed(address, self._clock())
                self._failures[address] = error.message
        finally:
            self._reading.discard(address)
            self._on_change()
