"""What each VF is served as: the name of its resource, from its PF's services.

Some PFs do not say their services in sysfs; their dev_cfg is then read through the helper, in tasks beside the look at
the devices, since a helper that does not answer must hold up nothing else. Until it is read the PF's VFs have no name.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from qat_server import logs
from qat_server.binding.plan import Attempts
from qat_server.devices import naming
from qat_server.devices.inventory import Inventory
from qat_server.helper_client.client import HelperClient, HelperError, HelperUnavailableError
from qat_server.instrumentation.conditions import Facts
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress

log = logs.get(__name__)

_NOT_TO_BE_HAD: Final = (ErrorCode.UNAVAILABLE, ErrorCode.DENIED)
"""This driver has no dev_cfg, or it is not for us to know."""


class Services:
    """Reads what is needed. `on_change` is called when names may differ, or something is to be read again."""

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
        self._attempts = Attempts()
        self._timer: asyncio.TimerHandle | None = None

    def look(self, inventory: Inventory, facts: Facts, work: asyncio.TaskGroup) -> None:
        """Read, in tasks of `work`, what is needed for names and not known; forget what is not needed any more."""
        needed = self._needed = {pf.address for pf in inventory.pfs if naming.needs_config(pf)}
        self._configs = {address: text for address, text in self._configs.items() if address in needed}
        self._failures = {address: why for address, why in self._failures.items() if address in needed}
        self._attempts = self._attempts.keep(needed)
        for address, why in self._failures.items():
            facts.say("services not read", address=address, why=why)
        if not self._helper.connected:
            return  # a look is asked for when it is back
        now = self._clock()
        for address in sorted(needed - self._configs.keys() - self._reading):
            if self._attempts.due(address, now):
                self._reading.add(address)
                work.create_task(self._read(address))
        self._wake_at(self._attempts.next_due(now))

    def names(self, inventory: Inventory) -> dict[PciAddress, str]:
        """Resource by VF; without a VF whose PF's dev_cfg is needed and has not been read."""
        pfs = {pf.address: pf for pf in inventory.pfs}
        names = {}
        for vf in inventory.vfs:
            pf = pfs.get(vf.pf) if vf.pf is not None else None
            config = self._configs.get(pf.address) if pf is not None else None
            if config is not None or pf is None or not naming.needs_config(pf):
                names[vf.address] = naming.resource_name(vf, pf, config)
        return names

    def missing(self) -> list[str]:
        """The PFs whose services are to be read yet, in words."""
        unread = sorted(self._needed - self._configs.keys())
        return [f"PF {address}: {self._failures.get(address, 'its services are being read')}" for address in unread]

    async def _read(self, address: PciAddress) -> None:
        try:
            self._configs[address] = (await self._helper.device_config(address)).text
            self._failures.pop(address, None)
        except HelperUnavailableError:
            return
        except HelperError as error:
            if error.code in _NOT_TO_BE_HAD:
                self._configs[address] = ""
            else:
                self._attempts = self._attempts.failed(address, self._clock())
                self._failures[address] = error.message
        finally:
            self._reading.discard(address)
            self._on_change()

    def _wake_at(self, due: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - self._clock()), self._on_change)
