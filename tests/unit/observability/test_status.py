"""Status: the report of a State, as data and as JSON."""

import json

import msgspec
import pytest

from qat_server.devices.inventory import Inventory
from qat_server.observability.state import State
from qat_server.observability.status_format import decode, encode
from qat_server.observability.status_report import status_from
from qat_shared import VERSION
from support.server_state import full_state, provisioning_state


def test_status_of_a_moment() -> None:
    status = status_from(full_state())

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
    status = status_from(full_state())
    text = encode(status)

    assert decode(text) == status
    assert json.loads(text)["vfs"][0]["address"] == "0000:6b:00.1"


def test_json_of_a_later_version_can_be_read() -> None:
    later = json.loads(encode(status_from(full_state()))) | {"provisioning": []}

    assert decode(json.dumps(later).encode()).version == VERSION


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"<html>", b"\xff"], ids=["empty", "no fields", "list", "html", "bytes"]
)
def test_what_is_no_status(text: bytes) -> None:
    with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
        decode(text)


def test_provisioning_is_reported() -> None:
    first, second = status_from(provisioning_state()).provisioning
    assert (first.pf, first.stage, first.held_by) == ("0000:6b:00.0", "waiting", ("default/pod/main", "a process"))
    assert (second.stage, second.reason) == ("failed", "the kernel refused")
