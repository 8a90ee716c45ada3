"""The screen of `qat-plugin status`: a Status as tables. Received texts are shown as text, never as markup."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from qat_server.command_line import tables
from qat_server.command_line.tables import plain
from qat_server.devices.inventory import no_vfs_hint
from qat_server.observability.status_format import Status
from qat_shared.confinement import missing

_Row = tuple[str, ...]

_USE = {True: "in use", False: "idle", None: "?"}


def show(status: Status, console: Console) -> None:
    """Print all of the status."""
    _line(console, f"qat-plugin {status.version}: ", "ready" if status.ready else "not ready", good=status.ready)
    for reason in status.not_ready:
        console.print(_text(f"  {reason}"))
    if status.cut:
        served = sum(vf.listed for vf in status.vfs)
        total = len(status.vfs) + len(status.cut)
        excess = f"{len(status.cut)} exceed --max-num-devices, starting with {status.cut[0]}"
        console.print(_text(f"{served} of {total} VFs served: {excess}"))
    elif not status.vfs:
        console.print(_text(f"no QAT VFs found: {no_vfs_hint(len(status.pfs))}"))
    helper = status.helper
    if helper.connected:
        detail = (
            f"connected, version {helper.version}, audit log at line {helper.audit_sequence} ({helper.audit_hash[:12]})"
        )
    else:
        detail = f"not connected: {helper.error}" if helper.error else "not connected"
    _line(console, "helper: ", detail, good=helper.connected)
    if helper.audit_broken:
        _line(console, "audit: ", helper.audit_broken, good=False)
    for process, state in (("server", status.sandbox), ("helper", helper.sandbox)):
        if state:
            lacking = missing(state)
            text = f"incomplete: {lacking}" if lacking else "complete"
            _line(console, f"{process} sandbox: ", text, good=not lacking)
    _show(console, "resources", ("resource", "capacity", "allocatable", "registered", "last error"), _resources(status))
    _show(
        console,
        "physical functions",
        ("PF", "device", "driver", "NUMA", "state", "services", "VFs", "served", "health"),
        _pfs(status),
    )
    _show(
        console,
        "virtual functions",
        ("VF", "PF", "driver", "NUMA", "resource", "use", "pod", "health"),
        _vfs(status),
    )
    if status.provisioning:
        columns = ("PF", "provisioning", "wanted", "steps", "held by", "reason")
        rows = (
            (pf.pf, pf.stage, pf.wanted, ", ".join(pf.steps), ", ".join(pf.held_by), pf.reason)
            for pf in status.provisioning
        )
        _show(console, "provisioning", columns, rows)
    if status.provisioning_error:
        console.print(_text(f"provisioning configuration: {status.provisioning_error}"))
    for problem in status.problems:
        console.print(_text(f"problem: {problem}"))


def _resources(status: Status) -> Iterator[_Row]:
    for each in status.resources:
        yield each.name, str(each.capacity), str(each.allocatable), "yes" if each.registered else "no", each.error


def _pfs(status: Status) -> Iterator[_Row]:
    for pf in status.pfs:
        yield (
            pf.address,
            pf.device,
            pf.driver or "none",
            _number(pf.numa_node),
            pf.state or "-",
            pf.services or "-",
            f"{pf.vfs}/{pf.total_vfs}",
            str(sum(vf.listed and vf.pf == pf.address for vf in status.vfs)),
            pf.reason or "ok",
        )


def _vfs(status: Status) -> Iterator[_Row]:
    for vf in status.vfs:
        yield (
            vf.address,
            vf.pf or "-",
            vf.driver or "none",
            _number(vf.numa_node),
            vf.resource if vf.listed else f"({vf.resource or '-'})",
            _USE[vf.in_use],
            vf.pod or "-",
            vf.reason or ("ok" if vf.listed else "not listed"),
        )


def _show(console: Console, title: str, columns: Sequence[str], rows: Iterable[_Row]) -> None:
    console.print()
    tables.show(console, title, columns, rows)


def _line(console: Console, label: str, text: str, *, good: bool) -> None:
    line = Text(label)
    line.append_text(_text(text, "green" if good else "red"))
    console.print(line)


def _text(text: str, style: str = "") -> Text:
    return Text(plain(text), style)


def _number(number: int | None) -> str:
    return "-" if number is None else str(number)
