"""The plan on a model of the device: every plan reaches the desired state, and changes no device in use."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from qat_server.devices.inventory import PhysicalFunction
from qat_server.provisioning.actual_state import ActualState
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.plan import services_problem
from qat_server.provisioning.qat_conf import Services, canonical
from qat_server.provisioning.steps import SetAutoReset, SetNumVfs, SetPmIdle, SetServices, Step
from qat_shared.resources import SERVICES
from qat_simulation.node.services import services_allowed
from support.provisioning_plans import POD, VFS, a_pf, a_state, configured, plan_of

DEVICE_IDS = (0x37C8, 0x4940, 0x4942, 0x4944, 0x4946, 0x4948)
_services = st.one_of(
    st.sampled_from([["dc"], ["sym", "asym"]]),  # supported by every device but the C62x
    st.lists(st.sampled_from(SERVICES), min_size=1, max_size=3, unique=True),
)


class Model:
    """A PF with the kernel driver's behaviour (adf_sysfs.c, adf_sriov.c).

    `forgets`: going down resets pm_idle_enabled, as before 6.12.
    """

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
        return a_pf(self.device_id, services, state, self.vfs)

    def state(self) -> ActualState:
        auto_reset, pm_idle = (self.auto_reset, self.pm_idle) if self.has_all else (None, None)
        return a_state(auto_reset, pm_idle, self.vfs)

    def down(self) -> None:
        if self.up:
            self.up, self.vfs = False, 0
            self.pm_idle = self.pm_idle or self.forgets

    def writes_of(self, step: Step) -> list[tuple[str, object]]:
        """The writes by which the helper carries out a step."""
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
    configured,
    st.one_of(st.none(), _services.map(";".join)),
    _optional,
    st.sampled_from([None, 0, 1, 2, "all"]),
    _optional,
)


@settings(max_examples=600)
@given(_models, _configurations, st.data())
def test_plan_reaches_the_desired_state_after_any_interruptions(
    model: Model, configuration: Configuration, data: st.DataObject
) -> None:
    one = plan_of(model.pf(), model.state(), configuration)
    for _ in range(data.draw(st.integers(0, 2))):
        writes = [write for step in one.steps for write in model.writes_of(step)]
        for what, to in writes[: data.draw(st.integers(0, len(writes)))]:
            model.write(what, to)
        one = plan_of(model.pf(), model.state(), configuration)
    if one.impossible:
        assert not model.writes
        return
    for step in one.steps:
        for what, to in model.writes_of(step):
            model.write(what, to)

    again = plan_of(model.pf(), model.state(), configuration)
    assert again.steps == again.pending == ()
    desired = again.desired
    assert model.vfs == (0 if desired.vfs == 0 else 2)
    if not model.gen2 and desired.services is not None:
        assert model.up
        assert canonical(model.services) == desired.services
    if model.has_all:
        assert model.up or desired.pm_idle_enabled is None
        assert desired.auto_reset in (None, model.auto_reset)
        assert desired.pm_idle_enabled in (None, model.pm_idle)


@given(_models, _configurations, st.sampled_from(["pod", "open", "not known"]))
def test_a_pf_in_use_is_never_changed(model: Model, configuration: Configuration, how: str) -> None:
    model.up, model.vfs = True, 2
    state = replace(model.state(), open_vfs=VFS[1:]) if how == "open" else model.state()
    one = plan_of(model.pf(), state, configuration, POD if how == "pod" else {}, known=how != "not known")
    assert all(isinstance(step, SetAutoReset) for step in one.steps)
    assert bool(one.pending) == bool(one.holds)


@given(st.sampled_from([*DEVICE_IDS[1:]]), _services.map(tuple))
def test_supported_services_are_those_of_the_emulated_kernel(device_id: int, services: Services) -> None:
    assert (services_problem(device_id, services) == "") == services_allowed(device_id, ";".join(services))
