"""A plan for people: one row for each PF. Pure."""

from msgspec import Struct

from qat_server.devices.inventory import PhysicalFunction
from qat_server.provisioning.configuration import Wanted
from qat_server.provisioning.plan import PfPlan, Plan, word
from qat_server.provisioning.qat_conf import canonical
from qat_server.provisioning.state import ProvisionedState


class Row(Struct, frozen=True):
    """A PF's line in the table that a person reads. `notes` are sentences for below the table."""

    pf: str
    now: str
    wanted: str
    steps: str
    held_by: str
    notes: tuple[str, ...]


def rows(planned: Plan) -> list[Row]:
    """The plan as a table: what each PF is now, what is wanted of it, what is done or waits, and who holds it."""
    return [
        Row(
            pf=f"{one.pf.address} ({one.pf.device_id:04x})",
            now=_now(one.pf, one.state),
            wanted=wanted_text(one.wanted),
            steps=steps_text(one),
            held_by=", ".join(dict.fromkeys(hold.holder for hold in one.waiting)),
            notes=(*one.notes, one.refused) if one.refused else one.notes,
        )
        for one in planned.pfs
    ]


def _now(pf: PhysicalFunction, state: ProvisionedState | None) -> str:
    words = [] if pf.services is None else [";".join(canonical(pf.services) or (pf.services,))]
    words += ["down"] if pf.state == "down" else []
    if state is not None:
        words += [] if state.auto_reset is None else [f"auto-reset {word(state.auto_reset)}"]
        words += [] if state.pm_idle_enabled is None else [f"pm-idle {word(state.pm_idle_enabled)}"]
        words.append(f"{state.num_vfs} of {state.total_vfs} VFs")
    return ", ".join(words)


def wanted_text(wanted: Wanted) -> str:
    """What is wanted of a PF, in a few words."""
    words = [] if wanted.services is None else [";".join(wanted.services)]
    words += [] if wanted.auto_reset is None else [f"auto-reset {word(wanted.auto_reset)}"]
    words += [] if wanted.pm_idle_enabled is None else [f"pm-idle {word(wanted.pm_idle_enabled)}"]
    words.append("no VFs" if wanted.vfs == 0 else "all VFs")
    return ", ".join(words)


def steps_text(one: PfPlan) -> str:
    """What is done or waits, "none" for nothing."""
    if one.impossible:
        return f"impossible: {one.impossible}"
    words = [str(step) for step in one.steps]
    if one.later:
        words.append(f"when free: {', '.join(str(step) for step in one.later)}")
    return ", ".join(words) or "none"
