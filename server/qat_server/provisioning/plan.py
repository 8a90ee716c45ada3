"""The plan: which steps lead from what the PFs are to what is wanted of them. Pure.

Each PF is planned by itself, from nothing but the device's state: what was interrupted anywhere is taken up by planning
anew. The kernel's rules that shape a plan (qat_common/adf_sysfs.c, adf_sriov.c, adf_init.c, adf_cfg_services.c, and
services_supported in adf_gen4_hw_data.c and adf_6xxx_hw_data.c):

- services and pm_idle_enabled can be written only while the device is down, and going down takes its VFs away. So a PF
  that a pod or process uses waits. auto_reset can be written at any time.
- Enabling VFs takes a device that is up down and up again, and brings up one that is down. It always enables all.
- Before kernel 6.12, going down forgets pm_idle_enabled. So it is written last, and the device stays down until
  enabling the VFs brings it up (SetPmIdle.stay_down).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from qat_server.devices.inventory import Inventory, PhysicalFunction, Problem, VirtualFunction
from qat_server.provisioning.configuration import Configuration, Wanted
from qat_server.provisioning.qat_conf import Services, canonical
from qat_server.provisioning.state import ProvisionedState
from qat_shared.devices import PHYSICAL, VIRTUAL
from qat_shared.messages import DPDK_DRIVERS
from qat_shared.pci import PciAddress

A_PROCESS: Final = "a process"
"""Who holds a VF that is open, but that no pod is known to have."""
NOT_KNOWN: Final = "not known"
"""Who may hold a VF while PodResources cannot be had."""

_GEN2: Final = 0x37C8
_GEN6: Final = 0x4948


class SetAutoReset(Struct, frozen=True, tag=True):
    """Write qat/auto_reset."""

    address: PciAddress
    on: bool

    def __str__(self) -> str:
        return f"auto-reset {word(self.on)}"


class SetServices(Struct, frozen=True, tag=True):
    """Take the device down if it is up, write qat/cfg_services, take it up. Its VFs are gone then."""

    address: PciAddress
    services: Services

    def __str__(self) -> str:
        return f"services {';'.join(self.services)}"


class SetPmIdle(Struct, frozen=True, tag=True):
    """Take the device down if it is up, write qat/pm_idle_enabled, take it up unless `stay_down`. No VFs then."""

    address: PciAddress
    on: bool
    stay_down: bool

    def __str__(self) -> str:
        return f"pm-idle {word(self.on)}"


class SetNumVfs(Struct, frozen=True, tag=True):
    """Write sriov_numvfs: 0, or all that there are (`count`). The device is up then."""

    address: PciAddress
    count: int

    def __str__(self) -> str:
        return f"{self.count} VFs" if self.count else "no VFs"


Step = SetAutoReset | SetServices | SetPmIdle | SetNumVfs


class Hold(Struct, frozen=True):
    """A VF that is in use, and by whom: namespace/pod/container, BEING_ADMITTED, a driver, A_PROCESS or NOT_KNOWN."""

    vf: PciAddress
    holder: str


class PfPlan(Struct, frozen=True):
    """One PF. `steps` can be done now, in this order; `later` when none of `waiting` is in use any more.

    `impossible` says why what is wanted cannot be had ("" when it can): then the PF is left as it is. `refused` is a
    sentence about services that the kernel did not take: all else is done.
    """

    pf: PhysicalFunction
    wanted: Wanted
    state: ProvisionedState | None
    steps: tuple[Step, ...] = ()
    later: tuple[Step, ...] = ()
    waiting: tuple[Hold, ...] = ()
    impossible: str = ""
    notes: tuple[str, ...] = ()
    refused: str = ""


class Plan(Struct, frozen=True):
    """All PFs that can be provisioned, in address order. `notes` are about the configuration."""

    pfs: tuple[PfPlan, ...]
    notes: tuple[str, ...] = ()


def plan(
    inventory: Inventory,
    states: Mapping[PciAddress, ProvisionedState | Problem],
    configuration: Configuration,
    holders: Mapping[PciAddress, str] | None,
    refused: Mapping[PciAddress, Services] = MappingProxyType({}),
) -> Plan:
    """What is to be done. `holders` are the pods that have VFs, None while that is not known: then any may be held.

    `refused` are services that the kernel did not take: they are not asked for again.
    """
    pfs = [pf for pf in inventory.pfs if (kind := PHYSICAL.get(pf.device_id)) is not None and kind.provisioned]
    foreign = {vf.address: f"driver {vf.driver}" for vf in inventory.vfs if _is_foreign(vf)}
    return Plan(
        pfs=tuple(
            _pf_plan(
                pf, states.get(pf.address), configuration.wanted_for(pf), holders, foreign, refused.get(pf.address)
            )
            for pf in pfs
        ),
        notes=tuple(f"qat.toml {name} fits no PF of this node" for name in configuration.unmatched(pfs)),
    )


def services_problem(device_id: int, services: Services) -> str:
    """Why a PF with this device id cannot take these services; "" when it can."""
    if device_id == _GEN2:
        return "it has no services to choose"
    if "dcc" in services and len(services) > 1:
        return "dcc stands alone"
    if "decomp" in services and device_id != _GEN6:
        return "only Gen6 devices (4948) have decomp"
    most, word = (3, "three") if device_id == _GEN6 else (2, "two")
    return f"it takes {word} services at most" if len(services) > most else ""


def _pf_plan(
    pf: PhysicalFunction,
    state: ProvisionedState | Problem | None,
    wanted: Wanted,
    holders: Mapping[PciAddress, str] | None,
    foreign: Mapping[PciAddress, str],
    refused: Services | None,
) -> PfPlan:
    if not isinstance(state, ProvisionedState):
        why = f"cannot be read: {state.text}" if state else "its state is not known"
        return PfPlan(pf, wanted, None, impossible=why)
    if impossible := _impossible(pf, wanted):
        return PfPlan(pf, wanted, state, impossible=impossible)
    notes = _notes(pf, state, wanted)
    refusal, asked = "", wanted
    if refused is not None and refused == wanted.services:
        # What else is wanted still is: without its VFs, which the attempt took away, the device would be of no use.
        refusal = f"the kernel refused {';'.join(refused)}: not tried again until the configuration changes"
        asked = replace(wanted, services=None)
    at_once: tuple[Step, ...] = ()
    if wanted.auto_reset is not None and state.auto_reset not in (None, wanted.auto_reset):
        at_once = (SetAutoReset(pf.address, wanted.auto_reset),)
    steps = _device_steps(pf, state, asked)
    if pf.state == "down" and not steps:
        notes = (*notes, "it is down, and nothing is wanted that brings it up")
    # Without VFs there is nothing that could be held; what takes none away needs not wait.
    if any(not isinstance(step, SetNumVfs) or not step.count for step in steps):
        waiting = _holds(pf, state, holders, foreign)
        if waiting:
            return PfPlan(pf, wanted, state, at_once, steps, waiting, notes=notes, refused=refusal)
    return PfPlan(pf, wanted, state, at_once + steps, notes=notes, refused=refusal)


def _impossible(pf: PhysicalFunction, wanted: Wanted) -> str:
    if wanted.services is None or pf.device_id == _GEN2:  # for a C62x it is a note: qat.conf is for all PFs of a node
        return ""
    if why := services_problem(pf.device_id, wanted.services):
        return f"{';'.join(wanted.services)} ({wanted.services_from}): {why}"
    return "" if pf.services is not None else "qat/cfg_services cannot be read, or its driver has none (kernel 6.0)"


def _notes(pf: PhysicalFunction, state: ProvisionedState, wanted: Wanted) -> tuple[str, ...]:
    notes = []
    if pf.device_id == _GEN2 and wanted.services is not None:
        notes.append(f"a {pf.device_id:04x} has no services to choose; only its VFs are provisioned")
    if wanted.auto_reset is not None and state.auto_reset is None:
        notes.append("its driver has no qat/auto_reset (4xxx, 420xx, 6xxx since kernel 6.9)")
    if wanted.pm_idle_enabled is not None and state.pm_idle_enabled is None:
        notes.append("its driver has no qat/pm_idle_enabled (4xxx, 420xx, 6xxx since kernel 6.5)")
    if wanted.vfs != 0 and state.total_vfs == 0:
        notes.append("it has no VFs: SR-IOV is not there, or turned off in the firmware")
    elif wanted.vfs and wanted.vfs != state.total_vfs:
        notes.append(f"vfs = {wanted.vfs}: the QAT driver always enables all {state.total_vfs}")
    return tuple(notes)


def _device_steps(pf: PhysicalFunction, state: ProvisionedState, wanted: Wanted) -> tuple[Step, ...]:
    """All but auto_reset. The order keeps each step from undoing one before it."""
    steps: list[Step] = []
    services = None if pf.device_id == _GEN2 else wanted.services
    down, vfs = pf.state == "down", state.num_vfs
    if wanted.vfs == 0 and vfs:
        steps.append(SetNumVfs(pf.address, 0))
        down, vfs = False, 0
    enable = wanted.vfs != 0 and state.total_vfs > 0
    # One that is down with the right services: an interrupted change. Enabling its VFs brings it up as well.
    stuck = down and not enable
    if services is not None and (services != canonical(pf.services) or stuck):
        steps.append(SetServices(pf.address, services))
        down, vfs, stuck = False, 0, False
    if wanted.pm_idle_enabled is not None and state.pm_idle_enabled is not None:
        differs = state.pm_idle_enabled != wanted.pm_idle_enabled
        # Enabled is what it is after the driver has forgotten it.
        forgotten = not wanted.pm_idle_enabled and (bool(steps) or (enable and not vfs and not down))
        if differs or forgotten or stuck:
            steps.append(SetPmIdle(pf.address, wanted.pm_idle_enabled, stay_down=enable))
            vfs = 0
    if enable and not vfs:
        steps.append(SetNumVfs(pf.address, state.total_vfs))
    return tuple(steps)


def _holds(
    pf: PhysicalFunction,
    state: ProvisionedState,
    holders: Mapping[PciAddress, str] | None,
    foreign: Mapping[PciAddress, str],
) -> tuple[Hold, ...]:
    holds = []
    for vf in sorted({*pf.vfs, *state.open_vfs}):
        if holders is not None and vf in holders:
            holds.append(Hold(vf, holders[vf]))
        elif vf in foreign or vf in state.open_vfs:
            holds.append(Hold(vf, foreign.get(vf, A_PROCESS)))
        elif holders is None:
            holds.append(Hold(vf, NOT_KNOWN))
    return tuple(holds)


def _is_foreign(vf: VirtualFunction) -> bool:
    """Somebody gave it to a driver of their own choice: to take it away is theirs too."""
    kind = VIRTUAL.get(vf.device_id)
    return vf.driver not in (None, *DPDK_DRIVERS, kind.driver if kind else None)


def word(on: bool) -> str:
    """A switch for people."""
    return "on" if on else "off"
