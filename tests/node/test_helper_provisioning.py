"""Operations on PFs in the real helper: which exclude which, what a hanging one holds up, what the log tells."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from qat_shared.messages import (
    AnyReply,
    AnyRequest,
    Bound,
    ErrorCode,
    Failure,
    Heartbeat,
    Provisioned,
    ReadHeartbeat,
    ReleaseDriver,
    Service,
    SetAutoReset,
    SetNumVfs,
    SetServices,
)
from qat_shared.pci import PciAddress
from qat_simulation.node.description import Node, Pf
from support.conditions import wait_until
from support.emulated_kernel import PF, VF, VF2, attribute, read
from support.helper_on_emulated_kernel import Running, code, helper_on
from support.helper_process import Client

OTHER_PF, OTHER_VF = "0001:6b:00.0", "0001:6b:00.1"
TWO_PFS = Node(pfs=tuple(Pf(address=address, services="dc", total_vfs=2) for address in (PF, OTHER_PF)))


@pytest.fixture
def running() -> Iterator[Running]:
    with helper_on(TWO_PFS) as running:
        yield running


def services(number: int = 1, pf: str = PF) -> AnyRequest:
    return SetServices(id=number, address=PciAddress.parse(pf), services=(Service.SYM, Service.ASYM), reason="a test")


def vfs(count: int, number: int = 1, pf: str = PF) -> AnyRequest:
    return SetNumVfs(id=number, address=PciAddress.parse(pf), count=count)


def on(number: int, pf: str = PF) -> AnyRequest:
    return SetAutoReset(id=number, address=PciAddress.parse(pf), on=True)


def release(number: int, vf: str) -> AnyRequest:
    return ReleaseDriver(id=number, address=PciAddress.parse(vf))


def refused(reply: AnyReply) -> str:
    assert code(reply) is ErrorCode.BUSY, reply
    assert isinstance(reply, Failure)
    return reply.message


@pytest.mark.parametrize("hanging", [services(1), vfs(0, 1)], ids=["SetServices", "SetNumVfs"])
def test_a_pf_has_one_operation_at_a_time_with_all_its_vfs(running: Running, hanging: AnyRequest) -> None:
    running.kernel.hang("qat/state", PF)
    running.kernel.hang("sriov_numvfs", PF)
    client = running.client
    client.send(hanging)
    wait_until(lambda: running.story()[-1:] == [("asked", "", PF)])
    for request in (services(2), vfs(2, 3), on(4), running.bind(VF, 5), running.bind(VF2, 6), release(7, VF)):
        assert "an earlier operation" in refused(client.ask(request))
    # Neither another PF with its VFs nor the reading of this one waits.
    assert isinstance(client.ask(on(10, OTHER_PF)), Provisioned)
    assert isinstance(client.ask(running.bind(OTHER_VF, 11)), Bound)
    assert isinstance(client.ask(ReadHeartbeat(id=12, address=PciAddress.parse(PF))), Heartbeat)
    assert isinstance(client.ask(services(13, OTHER_PF)), Provisioned)
    running.kernel.release("qat/state", PF)
    running.kernel.release("sriov_numvfs", PF)
    reply = client.receive()
    assert (reply.id, type(reply)) == (1, Provisioned)
    assert isinstance(client.ask(on(20)), Provisioned), "and when it has ended, the next may"


def test_a_vf_that_is_being_bound_keeps_its_pf_busy_and_no_other_vf(running: Running) -> None:
    running.kernel.hang("unbind", VF)
    client = running.client
    client.send(running.bind(VF, 1))
    wait_until(lambda: running.story()[-1:] == [("asked", "", VF)])
    for request in (services(2), vfs(0, 3), on(4)):
        assert "an earlier operation" in refused(client.ask(request))
    assert isinstance(client.ask(running.bind(VF2, 5)), Bound)
    running.kernel.release("unbind", VF)
    assert isinstance(client.receive(), Bound)
    assert isinstance(client.ask(services(6)), Provisioned)


def test_one_that_blocks_all_the_same_is_late_and_holds_up_its_pf_only(running: Running) -> None:
    """A VF is opened between the look and the write: the child waits in the kernel, and no signal is sent to it."""
    client, kernel = running.client, running.kernel
    assert isinstance(client.ask(running.bind(VF, 1)), Bound)
    kernel.hang("qat/state", PF)
    client.send(services(2))
    wait_until(kernel.hanging)  # it has looked, and is about to write
    # Another's answers: that of the first may come at any time.
    with kernel.open_vfio(VF), Client(running.socket) as other:
        kernel.release("qat/state", PF)
        wait_until(lambda: kernel.driver(VF) is None)  # half taken away: the link goes first
        assert read(kernel, attribute(PF, "qat/state")) == "down\n"
        assert isinstance(other.ask(services(3, OTHER_PF)), Provisioned)
        late = client.receive()
        assert (late.id, code(late)) == (2, ErrorCode.TIMED_OUT)
        refused(other.ask(services(4)))
    wait_until(lambda: ("late", "late", PF) in running.story())
    reply = client.ask(services(5))
    assert isinstance(reply, Provisioned)
    assert (reply.before, reply.now) == ("asym;sym", "asym;sym"), "it came to pass after all"


def test_the_audit_log_tells_what_was_and_what_is(running: Running) -> None:
    client = running.client
    for request in (services(1), vfs(2, 2), on(3)):
        assert isinstance(client.ask(request), Provisioned)
    assert code(client.ask(SetServices(id=4, address=PciAddress.parse(PF), services=(Service.DCC, Service.DC))))
    assert code(client.ask(vfs(3, 5)))
    told: list[tuple[Any, ...]] = []
    for line in map(json.loads, running.audit.read_bytes().splitlines()):
        if line["event"] in ("done", "refused"):
            del line["arguments"]["address"]
            told.append(
                (line["operation"], *line["arguments"].values(), line["verdict"], *list(line["result"].values())[:2])
            )
    assert told[:3] == [
        ("SetServices", "sym;asym", "ok", "dc", "asym;sym"),
        ("SetNumVfs", 2, "ok", "0", "2"),
        ("SetAutoReset", True, "ok", "off", "on"),
    ]
    assert told[3][:4] == ("SetServices", "dcc;dc", "failed", "kernel")
    assert told[4][:4] == ("SetNumVfs", 3, "denied", "denied")
