"""Status: what is told of a moment, as data, as JSON and on a screen."""

import io
import json
from typing import Any

import msgspec
import pytest
from rich.console import Console

from qat_server.command_line import status_view
from qat_server.devices.inventory import Inventory, PhysicalFunction, Problem, VirtualFunction
from qat_server.helper_client.client import HelperState
from qat_server.kubelet.device import Device
from qat_server.kubelet.endpoint import EndpointState
from qat_server.observability.state import State
from qat_server.observability.status import decode, encode
from qat_server.observability.status_report import status_from
from qat_server.provisioning.progress import Progress, Stage
from qat_shared import VERSION
from qat_shared.pci import PciAddress

PF = PciAddress(0, 0x6B, 0, 0)
VFS = [PciAddress(0, 0x6B, 0, function) for function in range(1, 6)]


def vf(address: PciAddress, **other: Any) -> VirtualFunction:
    fields: dict[str, Any] = {"driver": "vfio-pci", "in_use": False} | other
    return VirtualFunction(
        address=address, device_id=0x4941, pf=PF, numa_node=0, iommu_group=7, noiommu=False, uio=None, **fields
    )


def device(address: PciAddress, reason: str = "") -> Device:
    return Device(address=address, pf=PF, numa_node=0, nodes=("/dev/vfio/7",), mounts=(), reason=reason)


def moment() -> State:
    """One PF; VFs: 1 idle, 2 held, 3 foreign, 4 cannot be bound, 5 listed and vanished; a sixth is cut."""
    return State(
        inventory=Inventory(
            pfs=(
                PhysicalFunction(
                    address=PF,
                    device_id=0x4940,
                    driver="4xxx",
                    numa_node=0,
                    state="up",
                    services="sym;asym",
                    total_vfs=16,
                    vfs=tuple(VFS[:4]),
                ),
            ),
            vfs=(
                vf(VFS[0]),
                vf(VFS[1], in_use=True),
                vf(VFS[2], driver="4xxxvf", in_use=None),
                vf(VFS[3], driver=None, in_use=None),
            ),
            cut=(PciAddress(0, 0x6B, 0, 6),),
            problems=(Problem(None, "the bus is odd"), Problem(PF, "numa_node: not a number")),
        ),
        listing={"cy": (device(VFS[0]), device(VFS[1], "PF is down"), device(VFS[4], "vanished"))},
        names=dict.fromkeys(VFS[:4], "cy"),
        unhealthy={PF: "PF 0000:6b:00.0 is down"},
        heartbeats={PF: False},
        endpoints={"cy": EndpointState(True, 2, ""), "dc": EndpointState(False, 1, "connection refused")},
        helper=HelperState(True, "0.1.0", "", 17, "ab" * 32, "the helper's audit log went back"),
        foreign={VFS[2]: "qat_other"},
        failures={VFS[3]: "the kernel refused"},
        held={VFS[1]: "default/pod/main"},
        waits_for="another server is running",
        uevents=9,
        uevent_overruns=1,
    )


def test_status_of_a_moment() -> None:
    status = status_from(moment())

    assert (status.version, status.ready) == (VERSION, False)
    assert status.not_ready == (
        "another server is running",
        "qat.intel.com/dc is not registered with the kubelet: connection refused",
    )
    assert [(pf.address, pf.vfs, pf.total_vfs, pf.reason) for pf in status.pfs] == [
        ("0000:6b:00.0", 4, 16, "PF 0000:6b:00.0 is down")
    ]
    assert [(vf.address, vf.resource, vf.listed, vf.reason, vf.in_use, vf.pod) for vf in status.vfs] == [
        ("0000:6b:00.1", "cy", True, "", False, ""),
        ("0000:6b:00.2", "cy", True, "PF is down", True, "default/pod/main"),
        ("0000:6b:00.3", "cy", False, "left alone: bound to qat_other", None, ""),
        ("0000:6b:00.4", "cy", False, "the kernel refused", None, ""),
        ("0000:6b:00.5", "cy", True, "vanished", None, ""),
    ]
    assert [(each.name, each.capacity, each.allocatable, each.registered, each.error) for each in status.resources] == [
        ("cy", 3, 1, True, ""),
        ("dc", 0, 0, False, "connection refused"),
    ]
    assert status.problems == ("the bus is odd", "0000:6b:00.0: numa_node: not a number")
    assert status.cut == ("0000:6b:00.6",)


def test_empty_node_is_ready() -> None:
    status = status_from(State(inventory=Inventory(pfs=(), vfs=(), cut=(), problems=())))

    assert status.ready
    assert not (status.pfs or status.vfs or status.resources)
    assert not status.helper.connected


def test_json_goes_there_and_back() -> None:
    status = status_from(moment())
    text = encode(status)

    assert decode(text) == status
    assert json.loads(text)["vfs"][0]["address"] == "0000:6b:00.1"


def test_json_of_a_later_version_can_be_read() -> None:
    later = json.loads(encode(status_from(moment()))) | {"provisioning": []}

    assert decode(json.dumps(later).encode()).version == VERSION


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"<html>", b"\xff"], ids=["empty", "no fields", "list", "html", "bytes"]
)
def test_what_is_no_status(text: bytes) -> None:
    with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
        decode(text)


def shown(state: State) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    status_view.show(status_from(state), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_screen() -> None:
    text = shown(moment())

    for part in (
        f"qat-plugin {VERSION}: not ready",
        "  another server is running",
        "helper: connected, version 0.1.0, audit log at 17 (abababababab)",
        "audit: the helper's audit log went back",
        "connection refused",
        "0000:6b:00.2",
        "default/pod/main",
        "left alone: bound to qat_other",
        "problem: the bus is odd",
        "3 of 6 VFs served: 1 are beyond --max-num-devices, 0000:6b:00.6 first",
        "4/16",
    ):
        assert part in text


def test_screen_of_nothing_says_what_to_do() -> None:
    nothing = Inventory(pfs=(), vfs=(), cut=(), problems=())
    bare = msgspec.structs.replace(nothing, pfs=(msgspec.structs.replace(moment().inventory.pfs[0], vfs=()),))

    assert "no QAT VFs found: no PF either: load the PFs' kernel driver" in shown(State(inventory=nothing))
    assert "no QAT VFs found: enable them on a PF" in shown(State(inventory=bare))
    assert "no QAT VFs found" not in shown(moment())


def test_screen_shows_how_many_of_each_pf_are_served() -> None:
    (line,) = (line for line in shown(moment()).splitlines() if line.startswith(str(PF)))

    assert " 4/16  3  " in line


def test_screen_shows_text_as_text() -> None:
    state = msgspec.structs.replace(moment(), waits_for="[red]no[/red] \x1b]0;title\x07", helper=HelperState())
    text = shown(state)

    assert "[red]no[/red] \ufffd]0;title\ufffd" in text
    assert "helper: not connected" in text


def test_provisioning_is_shown() -> None:
    held = Progress(Stage.WAITING, "dc, all VFs", ("services dc", "16 VFs"), ("default/pod/main", "a process"))
    failed = Progress(Stage.FAILED, "dc, all VFs", ("services dc",), reason="the kernel refused")
    state = msgspec.structs.replace(
        moment(),
        provisioning={PciAddress.parse("0000:70:00.0"): failed, PciAddress.parse("0000:6b:00.0"): held},
        provisioning_error="qat.conf line 1: no",
    )
    first, second = status_from(state).provisioning
    assert (first.pf, first.stage, first.held_by) == ("0000:6b:00.0", "waiting", ("default/pod/main", "a process"))
    assert (second.stage, second.reason) == ("failed", "the kernel refused")
    text = shown(state)
    for part in ("services dc, 16 VFs", "default/pod/main, a process", "the kernel refused", "qat.conf line 1: no"):
        assert part in text
