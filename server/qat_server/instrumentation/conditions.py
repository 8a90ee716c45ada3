"""What is not as it should be, said once for as long as it stays so."""

from collections.abc import Sequence

from qat_server import logs
from qat_server.devices.inventory import Inventory
from qat_server.observability.status import no_vfs_hint

log = logs.get(__name__)


class Facts:
    """Found again by each look at the devices."""

    def __init__(self) -> None:
        self._before: set[tuple[str, str]] = set()
        self._now: set[tuple[str, str]] = set()

    def say(self, message: str, /, **fields: object) -> None:
        """Log a warning, unless it was said already and has been found by every look since."""
        key = (message, repr(fields))
        if key not in self._before and key not in self._now:
            log.warning(message, **fields)
        self._now.add(key)

    def of_inventory(self, inventory: Inventory, max_devices: int) -> None:
        """What a look at the devices found wrong."""
        for problem in inventory.problems:
            self.say("device not usable", address=problem.address, why=problem.text)
        if inventory.cut:
            self.say(
                "more VFs than --max-num-devices: the last in address order are left alone",
                max_num_devices=max_devices,
                left=len(inventory.cut),
                first=inventory.cut[0],
                last=inventory.cut[-1],
            )

    def no_vfs(self, pfs: int, drivers: Sequence[str]) -> None:
        """There is nothing to serve, with so many PFs of these kernel VF drivers."""
        self.say("no QAT VFs found", drivers=drivers, pfs=pfs, hint=no_vfs_hint(pfs))

    def settle(self) -> None:
        """A look has ended: what it has not found is over."""
        self._before, self._now = self._now, set()
