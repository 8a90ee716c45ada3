"""The status screen."""

import io

import msgspec
from rich.console import Console

from qat_server.command_line.status import view
from qat_server.devices.inventory import Inventory
from qat_server.helper_client.client import HelperState
from qat_server.observability.state import State
from qat_server.observability.status_report import status_from
from qat_shared import VERSION
from support.server_state import PF, full_state, provisioning_state


def shown(state: State) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    view.show(status_from(state), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_screen() -> None:
    text = shown(full_state())

    for part in (
        f"qat-plugin {VERSION}: not ready",
        "  another server is running",
        "helper: connected, version 0.1.0, audit log at line 17 (abababababab)",
        "audit: the helper's audit log went back",
        "connection refused",
        "0000:6b:00.2",
        "default/pod/main",
        "left alone: bound to qat_other",
        "problem: the bus is odd",
        "3 of 6 VFs served: 1 exceed --max-num-devices, starting with 0000:6b:00.6",
        "4/16",
    ):
        assert part in text


def test_screen_of_nothing_says_what_to_do() -> None:
    nothing = Inventory(pfs=(), vfs=(), cut=(), problems=())
    bare = msgspec.structs.replace(nothing, pfs=(msgspec.structs.replace(full_state().inventory.pfs[0], vfs=()),))

    assert "no QAT VFs found: no PF either: load the PFs' kernel driver" in shown(State(inventory=nothing))
    assert "no QAT VFs found: enable them on a PF" in shown(State(inventory=bare))
    assert "no QAT VFs found" not in shown(full_state())


def test_screen_shows_how_many_of_each_pf_are_served() -> None:
    (line,) = (line for line in shown(full_state()).splitlines() if line.startswith(str(PF)))

    assert " 4/16  3  " in line


def test_screen_shows_text_as_text() -> None:
    state = msgspec.structs.replace(full_state(), waits_for="[red]no[/red] \x1b]0;title\x07", helper=HelperState())
    text = shown(state)

    assert "[red]no[/red] \ufffd]0;title\ufffd" in text
    assert "helper: not connected" in text


def test_provisioning_is_shown() -> None:
    text = shown(provisioning_state())
    for part in ("services dc, 16 VFs", "default/pod/main, a process", "the kernel refused", "qat.conf line 1: no"):
        assert part in text
