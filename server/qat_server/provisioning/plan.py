"""The plan: the steps that lead from the actual state of the PFs to the desired state. Pure.

Each PF is planned independently, and only from the device's state, so an interrupted change is resumed by planning
again. The kernel's rules that shape a plan (qat_common/adf_sysfs.c, adf_sriov.c, adf_init.c, adf_cfg_services.c, and
services_supported in adf_gen4_hw_data.c and adf_6xxx_hw_data.c):

- services and pm_idle_enabled can be written only while the device is down, and going down removes its VFs. So a PF
  that a pod or process uses waits (the kernel shows no process on igb_uio). This is the first of three checks:
  provisioner.py withholds the VFs and queries again, and the helper reads `enable`. auto_reset can be written at any
  time.
- Enabling VFs takes a device that is up down and up again, and brings up one that is down. It always enables all VFs.
- Before kernel 6.12, going down resets pm_idle_enabled. So it is written after the services, and the device
  stays down until enabling the VFs brings it up (SetPmIdle.stay_down).

So the order is: auto_reset, no VFs (if none are wanted), services, pm_idle_enabled, all VFs.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from qat_server.devices.inventory import Inventory, PhysicalFunction, Problem, VirtualFunction
from qat_server.provisioning.actual_state import ActualState
from qat_server.provisioning.configuration import Configuration, DesiredState
from qat_server.provisioning.qat_conf import Services, canonical
from qat_server.provisioning.steps import SetAutoReset, SetNumVfs, SetPmIdle, SetServices, Step, removes_vfs
from qat_shared.devices import PHYSICAL, VIRTUAL
from qat_shared.messages import DPDK_DRIVERS
from qat_shared.pci import PciAddress

A_PROCESS: Final = "a process"
"""The holder of a VF that is open although no pod is known to hold it."""
NOT_KNOWN: Final = "not known"
"""The holder of a VF while PodResources is unavailable: any pod may hold it."""

_GEN2: Final = 0x37C8
_GEN6: Final = 0x4948


class Hold(Struct, frozen=True):
    """A VF in use and its holder: namespace/pod/container, BEING_ADMITTED, a driver, A_PROCESS or NOT_KNOWN."""

    vf: PciAddress
    holder: str


class PfPlan(Struct, frozen=True):
    """The plan for one PF. `steps` can be carried out now, in this order; `pending` once every VF in `holds` is free.

    `impossible` says why the desired state cannot be reached ("" when it can); the PF is then left unchanged.
    `refusal` is a sentence about services that the kernel refused; everything else is still provisioned.
    """

    pf: PhysicalFunction
    desired: DesiredState
    actual: ActualState | None
    steps: tuple[Step, ...] = ()
    pending: tuple[Step, ...] = ()
    holds: tuple[Hold, ...] = ()
    impossible: str = ""
    notes: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def holders(self) -> tuple[str, ...]:
        """The holders of VFs that this PF waits for, each once."""
        return tuple(dict.fromkeys(hold.holder for hold in self.holds))

    @property
    def removes_vfs(self) -> bool:
        """Whether `steps` remove VFs."""
        return any(map(removes_vfs, self.steps))


class Plan(Struct, frozen=True):
    """The plans of all PFs that can be provisioned, in address order. `notes` are about the configuration."""

    pfs: tuple[PfPlan, ...]
    notes: tuple[str, ...] = ()


def plan(
    inventory: Inventory,
    states: Mapping[PciAddress, ActualState | Problem],
    configuration: Configuration,
    holders: Mapping[PciAddress, str] | None,
    refused: Mapping[PciAddress, Services] = MappingProxyType({}),
) -> Plan:
    """Plan every PF. `holders` are the pods that hold VFs, None while unknown: any VF may then be held.

    `refused` are services that the kernel refused for a PF; they are not requested again.
    """
    pfs = [pf for pf in inventory.pfs if (kind := PHYSICAL.get(pf.device_id)) is not None and kind.provisioned]
    foreign = {vf.address: f"driver {vf.driver}" for vf in inventory.vfs if _is_foreign(vf)}
    return Plan(
        pfs=tuple(
            _pf_plan(
                pf, states.get(pf.address), configuration.desired_state(pf), holders, foreign, refused.get(pf.address)
            )
            for pf in pfs
        ),
        notes=tuple(f"qat.toml {name} matches no PF on this node" for name in configuration.unmatched(pfs)),
    )


def services_problem(device_id: int, services: Services) -> str:
    """Why a Gen4 or Gen6 PF with this device id does not support these services; "" when it does."""
    if "dcc" in services and len(services) > 1:
        return "dcc cannot be combined with other services"
    if "decomp" in services and device_id != _GEN6:
        return "only Gen6 devices (4948) support decomp"
    most, word = (3, "three") if device_id == _GEN6 else (2, "two")
    return f"it supports at most {word} services" if len(services) > most else ""


def _pf_plan(
    pf: PhysicalFunction,
    actual: ActualState | Problem | None,
    desired: DesiredState,
    holders: Mapping[PciAddress, str] | None,
    foreign: Mapping[PciAddress, str],
    refused: Services | None,
) -> PfPlan:
    if not isinstance(actual, ActualState):
        why = f"its state cannot be read: {actual.text}" if actual else "its state has not been read"
        return PfPlan(pf, desired, None, impossible=why)
    if impossible := _impossible(pf, desired):
        return PfPlan(pf, desired, actual, impossible=impossible)
    notes = _notes(pf, actual, desired)
    refusal, attempted = "", desired
    # A killed helper's child may have set the services before the next attempt was refused: then nothing is left to do.
    if refused is not None and refused == desired.services != canonical(pf.services):
        # The other settings still apply: the attempt removed the VFs, and without them the device is of no use.
        refusal = f"the kernel refused {';'.join(refused)}; it is not retried until the configuration changes"
        attempted = replace(desired, services=None)
    immediate: tuple[Step, ...] = ()
    if desired.auto_reset is not None and actual.auto_reset not in (None, desired.auto_reset):
        immediate = (SetAutoReset(pf.address, desired.auto_reset),)
    steps = _device_steps(pf, actual, attempted)
    if pf.state == "down" and not steps:
        notes = (*notes, "it is down, and no configured setting brings it up")
    # Steps that remove no VFs need not wait, and a PF without VFs has none that could be held.
    if any(map(removes_vfs, steps)) and (holds := _holds(pf, actual, holders, foreign)):
        return PfPlan(pf, desired, actual, immediate, steps, holds, notes=notes, refusal=refusal)
    return PfPlan(pf, desired, actual, immediate + steps, notes=notes, refusal=refusal)


def _impossible(pf: PhysicalFunction, desired: DesiredState) -> str:
    if desired.services is None or pf.device_id == _GEN2:  # a C62x gets a note: qat.conf applies to all PFs of a node
        return ""
    if why := services_problem(pf.device_id, desired.services):
        return f"{';'.join(desired.services)} ({desired.services_source}): {why}"
    return "" if pf.services is not None else "qat/cfg_services cannot be read, or its driver lacks it (kernel 6.0)"


def _notes(pf: PhysicalFunction, actual: ActualState, desired: DesiredState) -> tuple[str, ...]:
    notes = []
    if pf.device_id == _GEN2 and desired.services is not None:
        notes.append(f"the services of a {pf.device_id:04x} cannot be configured; only its VFs are provisioned")
    if desired.auto_reset is not None and actual.auto_reset is None:
        notes.append("its driver has no qat/auto_reset (4xxx, 420xx, 6xxx since kernel 6.9)")
    if desired.pm_idle_enabled is not None and actual.pm_idle_enabled is None:
        notes.append("its driver has no qat/pm_idle_enabled (4xxx, 420xx, 6xxx since kernel 6.5)")
    if desired.vfs != 0 and actual.total_vfs == 0:
        notes.append("it has no VFs: SR-IOV is unavailable, or disabled in the firmware")
    elif desired.vfs and desired.vfs != actual.total_vfs:
        notes.append(f"vfs = {desired.vfs}: the QAT driver always enables all {actual.total_vfs}")
    return tuple(notes)


def _device_steps(pf: PhysicalFunction, actual: ActualState, desired: DesiredState) -> tuple[Step, ...]:
    """All steps except auto_reset. In this order, no step undoes an earlier one."""
    steps: list[Step] = []
    services = None if pf.device_id == _GEN2 else desired.services
    down, vfs = pf.state == "down", actual.num_vfs
    if desired.vfs == 0 and vfs:
        steps.append(SetNumVfs(pf.address, 0))
        down, vfs = False, 0
    enable = desired.vfs != 0 and actual.total_vfs > 0
    # The device is down although its services are right. Enabling its VFs would bring it up as well.
    interrupted = down and not enable
    if services is not None and (services != canonical(pf.services) or interrupted):
        steps.append(SetServices(pf.address, services))
        down, vfs, interrupted = False, 0, False
    if desired.pm_idle_enabled is not None and actual.pm_idle_enabled is not None:
        differs = actual.pm_idle_enabled != desired.pm_idle_enabled
        # The driver resets it to enabled.
        reset = not desired.pm_idle_enabled and (bool(steps) or (enable and not vfs and not down))
        if differs or reset or interrupted:
            steps.append(SetPmIdle(pf.address, desired.pm_idle_enabled, stay_down=enable))
            vfs = 0
    if enable and not vfs:
        steps.append(SetNumVfs(pf.address, actual.total_vfs))
    return tuple(steps)


def _holds(
    pf: PhysicalFunction,
    actual: ActualState,
    holders: Mapping[PciAddress, str] | None,
    foreign: Mapping[PciAddress, str],
) -> tuple[Hold, ...]:
    holds = []
    for vf in sorted({*pf.vfs, *actual.open_vfs}):
        if holders is not None and vf in holders:
            holds.append(Hold(vf, holders[vf]))
        elif vf in foreign or vf in actual.open_vfs:
            holds.append(Hold(vf, foreign.get(vf, A_PROCESS)))
        elif holders is None:
            holds.append(Hold(vf, NOT_KNOWN))
    return tuple(holds)


def _is_foreign(vf: VirtualFunction) -> bool:
    """Whether somebody bound the VF to another driver: only they may release it."""
    kind = VIRTUAL.get(vf.device_id)
    return vf.driver not in (None, *DPDK_DRIVERS, kind.driver if kind else None)
