"""The kinds of steps, each one operation of the helper on one PF. plan.py decides which, and in which order."""

from msgspec import Struct

from qat_server.provisioning.qat_conf import Services
from qat_shared.pci import PciAddress


class SetAutoReset(Struct, frozen=True):
    """Write qat/auto_reset."""

    address: PciAddress
    on: bool

    def __str__(self) -> str:
        return f"auto-reset {on_off(self.on)}"


class SetServices(Struct, frozen=True):
    """Take the device down if it is up, write qat/cfg_services, take it up. Removes its VFs."""

    address: PciAddress
    services: Services

    def __str__(self) -> str:
        return f"services {';'.join(self.services)}"


class SetPmIdle(Struct, frozen=True):
    """Take the device down if it is up, write qat/pm_idle_enabled, take it up unless `stay_down`. Removes its VFs."""

    address: PciAddress
    on: bool
    stay_down: bool

    def __str__(self) -> str:
        return f"pm-idle {on_off(self.on)}"


class SetNumVfs(Struct, frozen=True):
    """Write sriov_numvfs: 0, or the number of all VFs (`count`). The device is up afterwards."""

    address: PciAddress
    count: int

    def __str__(self) -> str:
        return f"{self.count} VFs" if self.count else "no VFs"


Step = SetAutoReset | SetServices | SetPmIdle | SetNumVfs


def removes_vfs(step: Step) -> bool:
    """Whether the step removes the VFs of its PF, so that it must wait until no VF is in use."""
    return isinstance(step, (SetServices, SetPmIdle)) or (isinstance(step, SetNumVfs) and not step.count)


def on_off(switch: bool) -> str:
    """A switch as users read it."""
    return "on" if switch else "off"
