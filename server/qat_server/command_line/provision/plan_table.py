"""A plan on a terminal, for `provision` and `config check`: one row for each PF, and the notes below."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qat_server.devices.inventory import PhysicalFunction
from qat_server.provisioning.actual_state import ActualState
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.plan import PfPlan, Plan
from qat_server.provisioning.qat_conf import canonical
from qat_server.provisioning.steps import on_off


def show(planned: Plan, configuration: Configuration, console: Console) -> None:
    """Print the names of the configuration files, the plan as a table, and its notes."""
    files = ", ".join(configuration.files) or "none; all VFs are enabled, other settings are left unchanged"
    console.print(Text(f"configuration files: {files}"))
    if not planned.pfs:
        console.print(Text("no PF found that can be provisioned; is its kernel driver loaded?"))
        return
    table = Table("PF", "now", "wanted", "steps", "held by", box=None, pad_edge=False, header_style="bold")
    for each in planned.pfs:
        table.add_row(*map(Text, row(each)))
    console.print(table)
    for each in planned.pfs:
        for note in filter(None, (*each.notes, each.refusal)):
            console.print(Text(f"{_name(each.pf)}: {note}"))
    for note in planned.notes:
        console.print(Text(f"note: {note}"))


def row(pf_plan: PfPlan) -> tuple[str, str, str, str, str]:
    """The cells of a PF: its name, its actual and desired state, the steps between them, and who holds its VFs."""
    return (
        _name(pf_plan.pf),
        _actual(pf_plan.pf, pf_plan.actual),
        str(pf_plan.desired),
        _steps(pf_plan),
        ", ".join(pf_plan.holders),
    )


def _name(pf: PhysicalFunction) -> str:
    return f"{pf.address} ({pf.device_id:04x})"


def _actual(pf: PhysicalFunction, actual: ActualState | None) -> str:
    words = [] if pf.services is None else [";".join(canonical(pf.services) or (pf.services,))]
    words += ["down"] if pf.state == "down" else []
    if actual is not None:
        words += [] if actual.auto_reset is None else [f"auto-reset {on_off(actual.auto_reset)}"]
        words += [] if actual.pm_idle_enabled is None else [f"pm-idle {on_off(actual.pm_idle_enabled)}"]
        words.append(f"{actual.num_vfs} of {actual.total_vfs} VFs")
    return ", ".join(words)


def _steps(pf_plan: PfPlan) -> str:
    if pf_plan.impossible:
        return f"impossible: {pf_plan.impossible}"
    words = [str(step) for step in pf_plan.steps]
    if pf_plan.pending:
        words.append(f"when free: {', '.join(map(str, pf_plan.pending))}")
    return ", ".join(words) or "none"
