"""The plan: tables of what is done, what waits and what cannot be. On a model of the device: it leads there."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from qat_server.inventory import Inventory, PhysicalFunction, Problem, VirtualFunction
from qat_server.naming import SERVICES
from qat_server.provisioning import qat_toml
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.plan import (
    A_PROCESS,
    NOT_KNOWN,
    Hold,
    PfPlan,
    SetAutoReset,
    SetNumVfs,
    SetPmIdle,
    SetServices,
    Step,
    plan,
    services_problem,
)
from qat_server.provisioning.qat_conf import QatConf, Services, canonical
from qat_server.provisioning.qat_toml import PfSettings, QatToml
from qat_server.provisioning.state import ProvisionedState
from qat_server.provisioning.table import rows
from qat_server.simulation.services import services_allowed
from qat_shared.pci import PciAddress
from sysfs_tree import address

AT = address("6b:00.0")
VFS = tuple(address(f"6b:00.{function}") for function in (1, 2))


def _pf(
    device_id: int = 0x4940, services: str | None = "sym;asym", state: str | None = "up", vfs: int = 2
) -> PhysicalFunction:
    return PhysicalFunction(AT, device_id, None, 0, state, services, 2, VFS[:vfs])


def _state(
    auto_reset: bool | None = False, pm_idle: bool | None = True, num: int = 2, total: int = 2, *opened: PciAddress
) -> ProvisionedState:
    return ProvisionedState(auto_reset, pm_idle, num, total, opened)


def _wants(
    services: str | None = None,
    auto_reset: bool | None = None,
    vfs: int | str | None = None,
    pm_idle: bool | None = None,
) -> Configuration:
    defaults = PfSettings(vfs=vfs, pm_idle_enabled=pm_idle)
    conf = QatConf(canonical(services), auto_reset, 1 if services else None)
    return Configuration(conf, QatToml(defaults=defaults), ("qat.conf",))


def _one(
    pf: PhysicalFunction,
    state: ProvisionedState | Problem | None,
    wants: Configuration,
    holders: dict[PciAddress, str] | None = None,
    known: bool = True,
) -> PfPlan:
    planned = plan(
        Inventory((pf,), (), (), ()), {} if state is None else {AT: state}, wants, (holders or {}) if known else None
    )
    return planned.pfs[0]


SERVICES_DC = SetServices(AT, ("dc",))
ALL_VFS = SetNumVfs(AT, 2)

STEPS: dict[str, tuple[PhysicalFunction, ProvisionedState, Configuration, tuple[Step, ...]]] = {
    "nothing wanted, VFs there": (_pf(), _state(), _wants(), ()),
    "everything as wanted, other order": (_pf(), _state(), _wants("asym;sym", False, "all", True), ()),
    "no VFs yet": (_pf(vfs=0), _state(num=0), _wants(), (ALL_VFS,)),
    "other services": (_pf(), _state(), _wants("dc"), (SERVICES_DC, ALL_VFS)),
    "other services, no VFs wanted": (_pf(vfs=0), _state(num=0), _wants("dc", vfs=0), (SERVICES_DC,)),
    "services that are not understood": (_pf(services="new"), _state(), _wants("dc"), (SERVICES_DC, ALL_VFS)),
    "auto-reset": (_pf(), _state(), _wants(auto_reset=True), (SetAutoReset(AT, True),)),
    "auto-reset and services": (
        _pf(),
        _state(auto_reset=True),
        _wants("dc", False),
        (SetAutoReset(AT, False), SERVICES_DC, ALL_VFS),
    ),
    "pm-idle": (_pf(), _state(), _wants(pm_idle=False), (SetPmIdle(AT, False, stay_down=True), ALL_VFS)),
    "pm-idle, no VFs wanted": (
        _pf(vfs=0),
        _state(num=0),
        _wants(pm_idle=False, vfs=0),
        (SetPmIdle(AT, False, stay_down=False),),
    ),
    "pm-idle off would be forgotten by a change of services": (
        _pf(),
        _state(pm_idle=False),
        _wants("dc", pm_idle=False),
        (SERVICES_DC, SetPmIdle(AT, False, stay_down=True), ALL_VFS),
    ),
    "pm-idle off would be forgotten by enabling VFs": (
        _pf(vfs=0),
        _state(pm_idle=False, num=0),
        _wants(pm_idle=False),
        (SetPmIdle(AT, False, stay_down=True), ALL_VFS),
    ),
    "VFs not wanted": (_pf(), _state(), _wants(vfs=0), (SetNumVfs(AT, 0),)),
    "VFs not wanted and other services": (_pf(), _state(), _wants("dc", vfs=0), (SetNumVfs(AT, 0), SERVICES_DC)),
    "some VFs wanted": (_pf(vfs=0), _state(num=0), _wants(vfs=1), (ALL_VFS,)),
    "interrupted before the services were written": (
        _pf(state="down", vfs=0),
        _state(num=0),
        _wants("dc"),
        (SERVICES_DC, ALL_VFS),
    ),
    "interrupted after the services were written": (
        _pf(services="dc", state="down", vfs=0),
        _state(num=0),
        _wants("dc"),
        (ALL_VFS,),
    ),
    "interrupted, no VFs wanted": (
        _pf(services="dc", state="down", vfs=0),
        _state(num=0),
        _wants("dc", vfs=0),
        (SERVICES_DC,),
    ),
    "interrupted after pm-idle": (
        _pf(state="down", vfs=0),
        _state(pm_idle=False, num=0),
        _wants(pm_idle=False),
        (ALL_VFS,),
    ),
    "interrupted after pm-idle, no VFs wanted": (
        _pf(state="down", vfs=0),
        _state(pm_idle=False, num=0),
        _wants(pm_idle=False, vfs=0),
        (SetPmIdle(AT, False, stay_down=False),),
    ),
    "a C62x has only VFs": (
        _pf(0x37C8, None, None, vfs=0),
        _state(None, None, num=0),
        _wants("dc", True, pm_idle=False),
        (ALL_VFS,),
    ),
    "a kernel without auto_reset and pm_idle_enabled": (
        _pf(),
        _state(None, None),
        _wants("sym;asym", True, pm_idle=False),
        (),
    ),
    "no SR-IOV": (_pf(vfs=0), _state(num=0, total=0), _wants(), ()),
}


@pytest.mark.parametrize(("pf", "state", "wants", "steps"), STEPS.values(), ids=STEPS.keys())
def test_steps(pf: PhysicalFunction, state: ProvisionedState, wants: Configuration, steps: tuple[Step, ...]) -> None:
    one = _one(pf, state, wants)
    assert one.steps == steps
    assert (one.later, one.waiting, one.impossible) == ((), (), "")


POD = {VFS[0]: "default/crypto/main"}
HELD = (Hold(VFS[0], "default/crypto/main"),)

WAITING: dict[
    str, tuple[ProvisionedState, Configuration, dict[PciAddress, str], tuple[Step, ...], tuple[Hold, ...]]
] = {
    "services, a pod has a VF": (_state(), _wants("dc"), POD, (), HELD),
    "services, a VF is open": (_state(False, True, 2, 2, VFS[1]), _wants("dc"), {}, (), (Hold(VFS[1], A_PROCESS),)),
    "services, a pod has a VF open": (_state(False, True, 2, 2, VFS[0]), _wants("dc"), POD, (), HELD),
    "pm-idle": (_state(), _wants(pm_idle=False), POD, (), HELD),
    "VFs not wanted": (_state(), _wants(vfs=0), POD, (), HELD),
    "auto-reset does not wait for the services": (
        _state(),
        _wants("dc", auto_reset=True),
        POD,
        (SetAutoReset(AT, True),),
        HELD,
    ),
    "only auto-reset": (_state(), _wants(auto_reset=True), POD, (SetAutoReset(AT, True),), ()),
    "nothing to do": (_state(), _wants("asym;sym"), POD, (), ()),
    "a pod has another PF's VF": (
        _state(),
        _wants("dc"),
        {address("f3:00.1"): "default/crypto/main"},
        (SERVICES_DC, ALL_VFS),
        (),
    ),
}


@pytest.mark.parametrize(("state", "wants", "holders", "steps", "waiting"), WAITING.values(), ids=WAITING.keys())
def test_waiting(
    state: ProvisionedState,
    wants: Configuration,
    holders: dict[PciAddress, str],
    steps: tuple[Step, ...],
    waiting: tuple[Hold, ...],
) -> None:
    one = _one(_pf(), state, wants, holders)
    assert (one.steps, one.waiting) == (steps, waiting)
    assert bool(one.later) == bool(waiting)


def test_any_vf_may_be_held_while_the_pods_are_not_known() -> None:
    one = _one(_pf(), _state(), _wants("dc"), known=False)
    assert one.steps == ()
    assert one.waiting == tuple(Hold(vf, NOT_KNOWN) for vf in VFS)
    assert _one(_pf(vfs=0), _state(num=0), _wants("dc"), known=False).steps == (SERVICES_DC, ALL_VFS)


@pytest.mark.parametrize(
    ("driver", "holder"),
    [("qat_vfio_pci", "driver qat_vfio_pci"), ("vfio-pci", ""), ("igb_uio", ""), ("4xxxvf", ""), (None, "")],
)
def test_a_vf_on_a_driver_of_somebodys_choice_is_held_by_it(driver: str | None, holder: str) -> None:
    # in_use of the inventory is as old as the last look at that VF: what counts is the state, read just now.
    vf = VirtualFunction(VFS[0], 0x4941, driver, AT, 0, 1, False, None, True)
    planned = plan(Inventory((_pf(),), (vf,), (), ()), {AT: _state()}, _wants("dc"), {})
    assert planned.pfs[0].waiting == ((Hold(VFS[0], holder),) if holder else ())


@pytest.mark.parametrize(
    ("refused", "steps", "told"), [(("dc",), (ALL_VFS,), True), (("sym",), (SERVICES_DC, ALL_VFS), False)]
)
def test_what_the_kernel_refused_is_not_asked_again_and_the_rest_is_done(
    refused: Services, steps: tuple[Step, ...], told: bool
) -> None:
    inventory = Inventory((_pf(vfs=0),), (), (), ())
    one = plan(inventory, {AT: _state(num=0)}, _wants("dc"), {}, {AT: refused}).pfs[0]
    assert (one.steps, bool(one.refused)) == (steps, told)


IMPOSSIBLE: dict[str, tuple[PhysicalFunction, ProvisionedState | Problem | None, str, str]] = {
    "three on Gen4": (_pf(), _state(), "sym;asym;dc", "asym;sym;dc (qat.conf line 1): it takes two services at most"),
    "decomp on Gen4": (
        _pf(0x4946),
        _state(),
        "decomp",
        "decomp (qat.conf line 1): only Gen6 devices (4948) have decomp",
    ),
    "dcc with another": (_pf(0x4948), _state(), "dcc;sym", "sym;dcc (qat.conf line 1): dcc stands alone"),
    "four on Gen6": (
        _pf(0x4948),
        _state(),
        "sym;asym;dc;decomp",
        "asym;sym;dc;decomp (qat.conf line 1): it takes three services at most",
    ),
    "no cfg_services": (
        _pf(services=None),
        _state(),
        "dc",
        "qat/cfg_services cannot be read, or its driver has none (kernel 6.0)",
    ),
    "unreadable": (_pf(), Problem(AT, "sriov_numvfs: not text"), "dc", "cannot be read: sriov_numvfs: not text"),
    "not read": (_pf(), None, "dc", "its state is not known"),
}


@pytest.mark.parametrize(("pf", "state", "services", "why"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible(pf: PhysicalFunction, state: ProvisionedState | Problem | None, services: str, why: str) -> None:
    one = _one(pf, state, _wants(services, auto_reset=True))
    assert one.impossible == why
    assert (one.steps, one.later, one.waiting) == ((), (), ())


NOTES: dict[str, tuple[PhysicalFunction, ProvisionedState, Configuration, tuple[str, ...]]] = {
    "nothing to say": (_pf(), _state(), _wants("dc", True, 2, False), ()),
    "some VFs": (_pf(), _state(), _wants(vfs=1), ("vfs = 1: the QAT driver always enables all 2",)),
    "no VFs in the device": (
        _pf(vfs=0),
        _state(num=0, total=0),
        _wants(),
        ("it has no VFs: SR-IOV is not there, or turned off in the firmware",),
    ),
    "C62x": (
        _pf(0x37C8, None, None),
        _state(None, None),
        _wants("dc"),
        ("a 37c8 has no services to choose; only its VFs are provisioned",),
    ),
    "old kernel": (
        _pf(),
        _state(None, None),
        _wants(auto_reset=True, pm_idle=True),
        (
            "its driver has no qat/auto_reset (4xxx, 420xx, 6xxx since kernel 6.9)",
            "its driver has no qat/pm_idle_enabled (4xxx, 420xx, 6xxx since kernel 6.5)",
        ),
    ),
    "down by somebody's choice": (
        _pf(state="down", vfs=0),
        _state(num=0),
        _wants(vfs=0),
        ("it is down, and nothing is wanted that brings it up",),
    ),
}


@pytest.mark.parametrize(("pf", "state", "wants", "notes"), NOTES.values(), ids=NOTES.keys())
def test_notes(pf: PhysicalFunction, state: ProvisionedState, wants: Configuration, notes: tuple[str, ...]) -> None:
    assert _one(pf, state, wants).notes == notes


def test_each_pf_by_itself() -> None:
    others = [replace(_pf(device_id), address=at, vfs=()) for device_id, at in _OTHERS]
    states = {at: _state(num=0) for _, at in _OTHERS}
    planned = plan(Inventory((_pf(), *others), (), (), ()), states | {AT: _state()}, _wants("decomp"), POD)
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


def test_rules_that_fit_nothing_are_noted() -> None:
    wants = Configuration(toml=qat_toml.parse("[[rules]]\nnuma_node = 7\nvfs = 0"))
    planned = plan(Inventory((_pf(),), (), (), ()), {AT: _state()}, wants, {})
    assert planned.notes == ("qat.toml rules[0] fits no PF of this node",)


def test_table() -> None:
    def row(one: PfPlan) -> tuple[str, str, str, str]:
        (found,) = rows(plan(Inventory((one.pf,), (), (), ()), {AT: _state()}, wants, holders))
        assert found.pf == f"0000:6b:00.0 ({one.pf.device_id:04x})"
        return (found.now, found.wanted, found.steps, found.held_by)

    now = "asym;sym, auto-reset off, pm-idle on, 2 of 2 VFs"
    holders: dict[PciAddress, str] = {}
    wants = _wants("dc", True)
    one = _one(_pf(), _state(), wants)
    assert row(one) == (now, "dc, auto-reset on, all VFs", "auto-reset on, services dc, 2 VFs", "")
    holders = dict.fromkeys(VFS, "default/crypto/main")
    expected = "auto-reset on, when free: services dc, 2 VFs"
    assert row(one) == (now, "dc, auto-reset on, all VFs", expected, "default/crypto/main")
    wants = _wants(vfs=0, pm_idle=True)
    assert row(one) == (now, "pm-idle on, no VFs", "when free: no VFs", "default/crypto/main")
    wants = _wants()
    assert row(one) == (now, "all VFs", "none", "")
    wants = _wants("decomp")
    assert row(one)[2] == "impossible: decomp (qat.conf line 1): only Gen6 devices (4948) have decomp"


DEVICE_IDS = (0x37C8, 0x4940, 0x4942, 0x4944, 0x4946, 0x4948)
_services = st.one_of(
    st.sampled_from([["dc"], ["sym", "asym"]]),  # what every one but the C62x takes
    st.lists(st.sampled_from(SERVICES), min_size=1, max_size=3, unique=True),
)


class Model:
    """A PF as the kernel's driver behaves (adf_sysfs.c, adf_sriov.c). `forgets`: as before 6.12, pm_idle_enabled."""

    def __init__(
        self, device_id: int, services: str, up: bool, vfs: bool, pm_idle: bool, forgets: bool, has_all: bool
    ) -> None:
        self.device_id = device_id
        self.gen2 = device_id == 0x37C8
        self.services, self.pm_idle, self.auto_reset = services, pm_idle, False
        self.up = up or self.gen2
        self.vfs = 2 if vfs and self.up else 0
        self.forgets, self.has_all = forgets, has_all and not self.gen2
        self.writes = 0

    def pf(self) -> PhysicalFunction:
        services, state = (None, None) if self.gen2 else (self.services, "up" if self.up else "down")
        return _pf(self.device_id, services, state, self.vfs)

    def state(self) -> ProvisionedState:
        auto_reset, pm_idle = (self.auto_reset, self.pm_idle) if self.has_all else (None, None)
        return _state(auto_reset, pm_idle, self.vfs)

    def down(self) -> None:
        if self.up:
            self.up, self.vfs = False, 0
            self.pm_idle = self.pm_idle or self.forgets

    def writes_of(self, step: Step) -> list[tuple[str, object]]:
        """What the helper does for a step, write by write."""
        match step:
            case SetAutoReset(on=on):
                return [("auto_reset", on)]
            case SetServices(services=services):
                return [("down", None), ("services", ";".join(services)), ("up", None)]
            case SetPmIdle(on=on, stay_down=stay_down):
                return [("down", None), ("pm_idle", on), *([] if stay_down else [("up", None)])]
            case SetNumVfs(count=count):
                return [("vfs", count)]

    def write(self, what: str, to: object) -> None:
        self.writes += 1
        if what == "auto_reset":
            self.auto_reset = bool(to)
        elif what == "vfs":
            assert not (to and self.vfs)  # EBUSY
            self.down()
            self.up, self.vfs = True, 2 if to else 0
        elif what == "down":
            self.down()
        elif what == "up":
            self.up = True
        else:
            assert not self.up  # EINVAL
            if what == "services":
                assert services_allowed(self.device_id, str(to))
            setattr(self, what, to)


_models = st.builds(
    Model,
    st.sampled_from(DEVICE_IDS),
    _services.map(";".join),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
_optional = st.sampled_from([None, True, False])
_configurations = st.builds(
    _wants,
    st.one_of(st.none(), _services.map(";".join)),
    _optional,
    st.sampled_from([None, 0, 1, 2, "all"]),
    _optional,
)


@settings(max_examples=600)
@given(_models, _configurations, st.data())
def test_plan_leads_to_what_is_wanted_however_often_it_is_interrupted(
    model: Model, wants: Configuration, data: st.DataObject
) -> None:
    one = _one(model.pf(), model.state(), wants)
    for _ in range(data.draw(st.integers(0, 2))):
        writes = [write for step in one.steps for write in model.writes_of(step)]
        for what, to in writes[: data.draw(st.integers(0, len(writes)))]:
            model.write(what, to)
        one = _one(model.pf(), model.state(), wants)
    if one.impossible:
        assert not model.writes
        return
    for step in one.steps:
        for what, to in model.writes_of(step):
            model.write(what, to)

    again = _one(model.pf(), model.state(), wants)
    assert again.steps == again.later == ()
    wanted = again.wanted
    assert model.vfs == (0 if wanted.vfs == 0 else 2)
    if not model.gen2 and wanted.services is not None:
        assert model.up
        assert canonical(model.services) == wanted.services
    if model.has_all:
        assert model.up or wanted.pm_idle_enabled is None
        assert wanted.auto_reset in (None, model.auto_reset)
        assert wanted.pm_idle_enabled in (None, model.pm_idle)


@given(_models, _configurations, st.sampled_from(["pod", "open", "not known"]))
def test_held_pf_is_never_touched(model: Model, wants: Configuration, how: str) -> None:
    model.up, model.vfs = True, 2
    state = replace(model.state(), open_vfs=VFS[1:]) if how == "open" else model.state()
    one = _one(model.pf(), state, wants, POD if how == "pod" else {}, known=how != "not known")
    assert all(isinstance(step, SetAutoReset) for step in one.steps)
    assert bool(one.later) == bool(one.waiting)


@given(st.sampled_from([*DEVICE_IDS[1:]]), _services.map(tuple))
def test_possible_is_what_the_emulated_kernel_takes(device_id: int, services: Services) -> None:
    assert (services_problem(device_id, services) == "") == services_allowed(device_id, ";".join(services))
