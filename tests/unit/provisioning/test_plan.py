"""The plan: tables of steps, of PFs that wait, and of desired states that are impossible."""

import pytest
from msgspec.structs import replace

from qat_server.devices.inventory import Inventory, PhysicalFunction, Problem, VirtualFunction
from qat_server.provisioning import qat_toml
from qat_server.provisioning.actual_state import ActualState
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.plan import A_PROCESS, NOT_KNOWN, Hold, plan
from qat_server.provisioning.qat_conf import Services
from qat_server.provisioning.steps import SetAutoReset, SetNumVfs, SetPmIdle, SetServices, Step
from qat_shared.pci import PciAddress
from support.provisioning_plans import AT, POD, VFS, a_pf, a_state, configured, plan_of
from support.sysfs_tree import address

SERVICES_DC = SetServices(AT, ("dc",))
ALL_VFS = SetNumVfs(AT, 2)

STEPS: dict[str, tuple[PhysicalFunction, ActualState, Configuration, tuple[Step, ...]]] = {
    "no settings, VFs enabled": (a_pf(), a_state(), configured(), ()),
    "desired state reached, services in another order": (
        a_pf(),
        a_state(),
        configured("asym;sym", False, "all", True),
        (),
    ),
    "no VFs yet": (a_pf(vfs=0), a_state(num=0), configured(), (ALL_VFS,)),
    "other services": (a_pf(), a_state(), configured("dc"), (SERVICES_DC, ALL_VFS)),
    "other services, no VFs desired": (a_pf(vfs=0), a_state(num=0), configured("dc", vfs=0), (SERVICES_DC,)),
    "unknown services": (a_pf(services="new"), a_state(), configured("dc"), (SERVICES_DC, ALL_VFS)),
    "auto-reset": (a_pf(), a_state(), configured(auto_reset=True), (SetAutoReset(AT, True),)),
    "auto-reset and services": (
        a_pf(),
        a_state(auto_reset=True),
        configured("dc", False),
        (SetAutoReset(AT, False), SERVICES_DC, ALL_VFS),
    ),
    "pm-idle": (a_pf(), a_state(), configured(pm_idle=False), (SetPmIdle(AT, False, stay_down=True), ALL_VFS)),
    "pm-idle, no VFs desired": (
        a_pf(vfs=0),
        a_state(num=0),
        configured(pm_idle=False, vfs=0),
        (SetPmIdle(AT, False, stay_down=False),),
    ),
    "pm-idle off would be reset by a change of services": (
        a_pf(),
        a_state(pm_idle=False),
        configured("dc", pm_idle=False),
        (SERVICES_DC, SetPmIdle(AT, False, stay_down=True), ALL_VFS),
    ),
    "pm-idle off would be reset by enabling VFs": (
        a_pf(vfs=0),
        a_state(pm_idle=False, num=0),
        configured(pm_idle=False),
        (SetPmIdle(AT, False, stay_down=True), ALL_VFS),
    ),
    "VFs not desired": (a_pf(), a_state(), configured(vfs=0), (SetNumVfs(AT, 0),)),
    "VFs not desired and other services": (a_pf(), a_state(), configured("dc", vfs=0), (SetNumVfs(AT, 0), SERVICES_DC)),
    "some VFs desired": (a_pf(vfs=0), a_state(num=0), configured(vfs=1), (ALL_VFS,)),
    "interrupted before the services were written": (
        a_pf(state="down", vfs=0),
        a_state(num=0),
        configured("dc"),
        (SERVICES_DC, ALL_VFS),
    ),
    "interrupted after the services were written": (
        a_pf(services="dc", state="down", vfs=0),
        a_state(num=0),
        configured("dc"),
        (ALL_VFS,),
    ),
    "interrupted, no VFs desired": (
        a_pf(services="dc", state="down", vfs=0),
        a_state(num=0),
        configured("dc", vfs=0),
        (SERVICES_DC,),
    ),
    "interrupted after pm-idle": (
        a_pf(state="down", vfs=0),
        a_state(pm_idle=False, num=0),
        configured(pm_idle=False),
        (ALL_VFS,),
    ),
    "interrupted after pm-idle, no VFs desired": (
        a_pf(state="down", vfs=0),
        a_state(pm_idle=False, num=0),
        configured(pm_idle=False, vfs=0),
        (SetPmIdle(AT, False, stay_down=False),),
    ),
    "a C62x has only VFs": (
        a_pf(0x37C8, None, None, vfs=0),
        a_state(None, None, num=0),
        configured("dc", True, pm_idle=False),
        (ALL_VFS,),
    ),
    "a kernel without auto_reset and pm_idle_enabled": (
        a_pf(),
        a_state(None, None),
        configured("sym;asym", True, pm_idle=False),
        (),
    ),
    "no SR-IOV": (a_pf(vfs=0), a_state(num=0, total=0), configured(), ()),
}


@pytest.mark.parametrize(("pf", "state", "configuration", "steps"), STEPS.values(), ids=STEPS.keys())
def test_steps(pf: PhysicalFunction, state: ActualState, configuration: Configuration, steps: tuple[Step, ...]) -> None:
    one = plan_of(pf, state, configuration)
    assert one.steps == steps
    assert (one.pending, one.holds, one.impossible) == ((), (), "")


HELD = (Hold(VFS[0], "default/crypto/main"),)

WAITING: dict[str, tuple[ActualState, Configuration, dict[PciAddress, str], tuple[Step, ...], tuple[Hold, ...]]] = {
    "services, a pod has a VF": (a_state(), configured("dc"), POD, (), HELD),
    "services, a VF is open": (
        a_state(False, True, 2, 2, VFS[1]),
        configured("dc"),
        {},
        (),
        (Hold(VFS[1], A_PROCESS),),
    ),
    "services, a pod has a VF open": (a_state(False, True, 2, 2, VFS[0]), configured("dc"), POD, (), HELD),
    "pm-idle": (a_state(), configured(pm_idle=False), POD, (), HELD),
    "VFs not desired": (a_state(), configured(vfs=0), POD, (), HELD),
    "auto-reset does not wait for the services": (
        a_state(),
        configured("dc", auto_reset=True),
        POD,
        (SetAutoReset(AT, True),),
        HELD,
    ),
    "only auto-reset": (a_state(), configured(auto_reset=True), POD, (SetAutoReset(AT, True),), ()),
    "nothing to do": (a_state(), configured("asym;sym"), POD, (), ()),
    "a pod has another PF's VF": (
        a_state(),
        configured("dc"),
        {address("f3:00.1"): "default/crypto/main"},
        (SERVICES_DC, ALL_VFS),
        (),
    ),
}


@pytest.mark.parametrize(("state", "configuration", "holders", "steps", "holds"), WAITING.values(), ids=WAITING.keys())
def test_waiting(
    state: ActualState,
    configuration: Configuration,
    holders: dict[PciAddress, str],
    steps: tuple[Step, ...],
    holds: tuple[Hold, ...],
) -> None:
    one = plan_of(a_pf(), state, configuration, holders)
    assert (one.steps, one.holds) == (steps, holds)
    assert bool(one.pending) == bool(holds)


def test_any_vf_may_be_held_while_the_holders_are_unknown() -> None:
    one = plan_of(a_pf(), a_state(), configured("dc"), known=False)
    assert one.steps == ()
    assert one.holds == tuple(Hold(vf, NOT_KNOWN) for vf in VFS)
    assert plan_of(a_pf(vfs=0), a_state(num=0), configured("dc"), known=False).steps == (SERVICES_DC, ALL_VFS)


@pytest.mark.parametrize(
    ("driver", "holder"),
    [("qat_vfio_pci", "driver qat_vfio_pci"), ("vfio-pci", ""), ("igb_uio", ""), ("4xxxvf", ""), (None, "")],
)
def test_a_vf_on_another_driver_is_held_by_that_driver(driver: str | None, holder: str) -> None:
    # in_use of the inventory may be outdated. Only the actual state counts, which has just been read.
    vf = VirtualFunction(VFS[0], 0x4941, driver, AT, 0, 1, False, None, True)
    planned = plan(Inventory((a_pf(),), (vf,), (), ()), {AT: a_state()}, configured("dc"), {})
    assert planned.pfs[0].holds == ((Hold(VFS[0], holder),) if holder else ())


@pytest.mark.parametrize(
    ("now", "refused", "steps", "reported"),
    [
        ("sym", ("dc",), (ALL_VFS,), True),
        ("sym", ("sym",), (SERVICES_DC, ALL_VFS), False),
        ("dc", ("dc",), (ALL_VFS,), False),  # the refused attempt came after one that had succeeded
    ],
)
def test_refused_services_are_not_requested_again_and_other_steps_are_planned(
    now: str, refused: Services, steps: tuple[Step, ...], reported: bool
) -> None:
    inventory = Inventory((a_pf(services=now, vfs=0),), (), (), ())
    one = plan(inventory, {AT: a_state(num=0)}, configured("dc"), {}, {AT: refused}).pfs[0]
    assert (one.steps, bool(one.refusal)) == (steps, reported)


IMPOSSIBLE: dict[str, tuple[PhysicalFunction, ActualState | Problem | None, str, str]] = {
    "three on Gen4": (
        a_pf(),
        a_state(),
        "sym;asym;dc",
        "asym;sym;dc (qat.conf line 1): it supports at most two services",
    ),
    "decomp on Gen4": (
        a_pf(0x4946),
        a_state(),
        "decomp",
        "decomp (qat.conf line 1): only Gen6 devices (4948) support decomp",
    ),
    "dcc with another": (
        a_pf(0x4948),
        a_state(),
        "dcc;sym",
        "sym;dcc (qat.conf line 1): dcc cannot be combined with other services",
    ),
    "four on Gen6": (
        a_pf(0x4948),
        a_state(),
        "sym;asym;dc;decomp",
        "asym;sym;dc;decomp (qat.conf line 1): it supports at most three services",
    ),
    "no cfg_services": (
        a_pf(services=None),
        a_state(),
        "dc",
        "qat/cfg_services cannot be read, or its driver lacks it (kernel 6.0)",
    ),
    "unreadable": (
        a_pf(),
        Problem(AT, "sriov_numvfs: not text"),
        "dc",
        "its state cannot be read: sriov_numvfs: not text",
    ),
    "not read": (a_pf(), None, "dc", "its state has not been read"),
}


@pytest.mark.parametrize(("pf", "state", "services", "why"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible(pf: PhysicalFunction, state: ActualState | Problem | None, services: str, why: str) -> None:
    one = plan_of(pf, state, configured(services, auto_reset=True))
    assert one.impossible == why
    assert (one.steps, one.pending, one.holds) == ((), (), ())


NOTES: dict[str, tuple[PhysicalFunction, ActualState, Configuration, tuple[str, ...]]] = {
    "no notes": (a_pf(), a_state(), configured("dc", True, 2, False), ()),
    "some VFs": (a_pf(), a_state(), configured(vfs=1), ("vfs = 1: the QAT driver always enables all 2",)),
    "no VFs in the device": (
        a_pf(vfs=0),
        a_state(num=0, total=0),
        configured(),
        ("it has no VFs: SR-IOV is unavailable, or disabled in the firmware",),
    ),
    "C62x": (
        a_pf(0x37C8, None, None),
        a_state(None, None),
        configured("dc"),
        ("the services of a 37c8 cannot be configured; only its VFs are provisioned",),
    ),
    "old kernel": (
        a_pf(),
        a_state(None, None),
        configured(auto_reset=True, pm_idle=True),
        (
            "its driver has no qat/auto_reset (4xxx, 420xx, 6xxx since kernel 6.9)",
            "its driver has no qat/pm_idle_enabled (4xxx, 420xx, 6xxx since kernel 6.5)",
        ),
    ),
    "down, without a setting that brings it up": (
        a_pf(state="down", vfs=0),
        a_state(num=0),
        configured(vfs=0),
        ("it is down, and no configured setting brings it up",),
    ),
}


@pytest.mark.parametrize(("pf", "state", "configuration", "notes"), NOTES.values(), ids=NOTES.keys())
def test_notes(pf: PhysicalFunction, state: ActualState, configuration: Configuration, notes: tuple[str, ...]) -> None:
    assert plan_of(pf, state, configuration).notes == notes


def test_each_pf_is_planned_independently() -> None:
    others = [replace(a_pf(device_id), address=at, vfs=()) for device_id, at in _OTHERS]
    states = {at: a_state(num=0) for _, at in _OTHERS}
    planned = plan(Inventory((a_pf(), *others), (), (), ()), states | {AT: a_state()}, configured("decomp"), POD)
    assert [(one.pf.device_id, bool(one.steps), bool(one.impossible)) for one in planned.pfs] == [
        (0x4940, False, True),
        (0x37C8, True, False),
        (0x4948, True, False),
    ]


_OTHERS = (
    (0x37C8, address("70:00.0")),
    (0x4948, address("10000:6b:00.0")),
    (0x0435, address("71:00.0")),  # not provisioned
)


def test_rules_that_match_no_pf_are_noted() -> None:
    configuration = Configuration(toml=qat_toml.parse("[[rules]]\nnuma_node = 7\nvfs = 0"))
    planned = plan(Inventory((a_pf(),), (), (), ()), {AT: a_state()}, configuration, {})
    assert planned.notes == ("qat.toml rules[0] matches no PF on this node",)
