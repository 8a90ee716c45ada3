"""Plans for one PF with two VFs: its inventory entry, its actual state, a configuration, and the plan for them."""

from qat_server.devices.inventory import Inventory, PhysicalFunction, Problem
from qat_server.provisioning.actual_state import ActualState
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.plan import PfPlan, plan
from qat_server.provisioning.qat_conf import QatConf, canonical
from qat_server.provisioning.qat_toml import PfSettings, QatToml
from qat_shared.pci import PciAddress
from support.sysfs_tree import address

AT = address("6b:00.0")
VFS = tuple(address(f"6b:00.{function}") for function in (1, 2))
POD = {VFS[0]: "default/crypto/main"}


def a_pf(
    device_id: int = 0x4940, services: str | None = "sym;asym", state: str | None = "up", vfs: int = 2
) -> PhysicalFunction:
    return PhysicalFunction(AT, device_id, None, 0, state, services, 2, VFS[:vfs])


def a_state(
    auto_reset: bool | None = False, pm_idle: bool | None = True, num: int = 2, total: int = 2, *opened: PciAddress
) -> ActualState:
    return ActualState(auto_reset, pm_idle, num, total, opened)


def configured(
    services: str | None = None,
    auto_reset: bool | None = None,
    vfs: int | str | None = None,
    pm_idle: bool | None = None,
) -> Configuration:
    defaults = PfSettings(vfs=vfs, pm_idle_enabled=pm_idle)
    conf = QatConf(canonical(services), auto_reset, 1 if services else None)
    return Configuration(conf, QatToml(defaults=defaults), ("qat.conf",))


def plan_of(
    pf: PhysicalFunction,
    state: ActualState | Problem | None,
    configuration: Configuration,
    holders: dict[PciAddress, str] | None = None,
    known: bool = True,
) -> PfPlan:
    states = {} if state is None else {AT: state}
    planned = plan(Inventory((pf,), (), (), ()), states, configuration, (holders or {}) if known else None)
    return planned.pfs[0]
