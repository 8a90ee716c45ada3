"""The dispatcher's child processes: reuse, limits, and what happens to the work of a killed child."""

import errno
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from qat_helper import dispatch
from qat_helper.child import Child
from qat_helper.errors import PENDING_HEAD, OperationError
from qat_helper.operations.node import Node, Outcome
from qat_shared.messages import (
    AnyRequest,
    BindDriver,
    Bound,
    ErrorCode,
    Failure,
    Heartbeat,
    OpenPodResources,
)
from support.dispatcher_bench import CALLER, Bench, Function, Gate, bind, bind_device, done, failure, report_pid


def test_no_child_and_no_descriptor_is_left(bench: Bench) -> None:
    bench.operation(BindDriver, done)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        bench.ask(bind(number))
        bench.run(lambda number=number: len(bench.replies) > number)  # type: ignore[misc]
    bench.run(lambda: not bench.calls)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_is_reused_while_operations_of_its_kind_are_running(bench: Bench) -> None:
    bench.operation(BindDriver, report_pid, max_children=2)
    for number in range(20):
        bench.ask(bind_device(number))
    bench.run(lambda: len(bench.replies) == 20)
    assert len({reply.driver for reply in bench.replies if isinstance(reply, Bound)}) <= 2
    assert sorted(reply.id for reply in bench.replies) == list(range(20))
    asked = [line["sequence"] for line in bench.lines() if line["event"] == "asked"]
    assert Counter(bench.events()) == Counter([("asked", "", 0)] * 20 + [("done", "ok", number) for number in asked])
    bench.run(lambda: not bench.calls)


def test_an_idle_child_serves_one_peer_and_makes_room_for_another(bench: Bench) -> None:
    """With one blocked child and an idle one, the operation has used up its children."""
    gate = Gate(bench, report_pid)
    bench.operation(
        BindDriver, lambda node, request: gate(node, request) if request.id == 1 else report_pid(node, request), 2
    )
    one, other = object(), object()
    bench.ask(bind_device(1), one)
    bench.ask(bind_device(2), one)
    bench.run(lambda: len(bench.replies) == 1)
    assert len(bench.calls) == 2, "it is kept while another of its kind is running"
    bench.ask(bind_device(3), one)
    bench.run(lambda: len(bench.replies) == 2)
    bench.ask(bind_device(4), other)
    bench.run(lambda: len(bench.replies) == 3)
    second, third, fourth = (reply.driver for reply in bench.replies if isinstance(reply, Bound))
    assert second == third
    assert third != fourth
    gate.open()
    bench.run(lambda: not bench.calls)
    assert len(bench.replies) == 4


def test_few_children_are_idle(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have been idle longest are dismissed, because each takes memory."""
    monkeypatch.setattr(dispatch, "MAX_IDLE", 2)
    gate = Gate(bench, report_pid)
    bench.operation(
        BindDriver, lambda node, request: gate(node, request) if request.id == 1 else report_pid(node, request), 8
    )
    for number in range(1, 9):
        bench.ask(bind_device(number))
    assert len(bench.calls) == 8
    bench.run(lambda: len(bench.replies) == 7 and len(bench.calls) == 1 + 2)
    bench.ask(bind_device(9))
    bench.run(lambda: len(bench.replies) == 8)
    *before, last = (reply.driver for reply in bench.replies if isinstance(reply, Bound))
    assert last in before, "the remaining ones are reused"
    gate.open()
    bench.run(lambda: not bench.calls)


def test_a_peer_that_leaves_while_no_process_can_be_started(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer does not read its reply and is dropped: its queued requests do not begin, and none ends twice."""
    gate, peer = Gate(bench), object()
    bench.operation(BindDriver, gate, max_children=1)
    bench.ask(bind_device(1))

    def dropped(outcome: Outcome) -> None:
        bench.replies.append(outcome.reply)
        if len(bench.replies) == 2:  # its first reply
            bench.dispatcher.cancel(peer)

    for number in (2, 3, 4):
        bench.dispatcher.submit(CALLER, bind_device(number), dropped, peer)
    bench.ask(bind_device(5))

    def none_to_be_had(work: Callable[[AnyRequest], Outcome]) -> None:
        monkeypatch.setattr(dispatch, "Child", Child)  # the next start succeeds
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(dispatch, "Child", none_to_be_had)
    gate.stay_open(bench, lambda: not bench.calls)
    assert sorted(reply.id for reply in bench.replies) == [1, 2, 3, 4, 5]
    ended = Counter(line["asked"] for line in bench.lines() if line["event"] == "done")
    assert ended == {line["sequence"]: 1 for line in bench.lines() if line["event"] == "asked"}


def test_a_reused_child_keeps_no_descriptors(bench: Bench) -> None:
    """It passes descriptors and fails; after each request only its channel is open."""

    def tell(node: Node, request: AnyRequest) -> Outcome:
        found = f"{os.getpid()} {len(os.listdir('/proc/self/fd')) - 1}"  # without the descriptor of the listing
        if request.id % 2:
            raise OperationError(ErrorCode.UNAVAILABLE, found)
        reply = Bound(id=request.id, audit=PENDING_HEAD, driver=found, changed=False)
        return Outcome(reply, os.open("/dev/null", os.O_RDONLY))

    bench.operation(BindDriver, tell, max_children=1)
    for number in range(6):
        bench.ask(bind_device(number))
    bench.run(lambda: len(bench.replies) == 6)
    told = {reply.driver if isinstance(reply, Bound) else failure(reply).message for reply in bench.replies}
    assert len(told) == 1, "the same child, with the same number of descriptors"
    assert len(bench.descriptors) == 3
    for descriptor in bench.descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("idle", [False, True])
def test_a_killed_child_fails_its_own_operation_only(bench: Bench, idle: bool) -> None:
    """As the kernel does when memory is short: during an operation or between two."""
    gate = Gate(bench, report_pid)

    def end(node: Node, request: AnyRequest) -> Outcome:
        if request.id == 2 and not idle:
            os.kill(os.getpid(), signal.SIGKILL)
        return gate(node, request) if request.id == 1 else report_pid(node, request)

    bench.operation(BindDriver, end, max_children=2)
    for number in (1, 2, 3):
        bench.ask(bind_device(number))
    bench.run(lambda: len(bench.replies) == 2)
    if idle:
        (pid,) = {int(reply.driver or "") for reply in bench.replies if isinstance(reply, Bound)}
        os.kill(pid, signal.SIGKILL)
        bench.run(lambda: len(bench.calls) == 1)
    bench.ask(bind_device(4))
    bench.run(lambda: len(bench.replies) == 3)
    gate.open()
    bench.run(lambda: not bench.calls)
    failed = [reply for reply in bench.replies if isinstance(reply, Failure)]
    assert [(reply.id, reply.code) for reply in failed] == ([] if idle else [(2, ErrorCode.INTERNAL)])
    assert Counter(line.get("verdict") for line in bench.lines() if line["event"] == "done") == Counter(
        {"ok": 4} if idle else {"ok": 3, "failed": 1}
    )


def test_a_request_that_cannot_be_sent_to_a_child_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when there is no memory for a packet."""
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "Child", Untold)
        bench.ask(bind(1))
    bench.run(lambda: bench.replies)
    assert failure(bench.replies[0]).code is ErrorCode.INTERNAL
    bench.operation(BindDriver, done)
    bench.ask(bind(2))
    bench.run(lambda: len(bench.replies) == 2)
    assert isinstance(bench.replies[1], Bound), "its device is free"


class Untold(Child):
    def __init__(self, work: Callable[[AnyRequest], Outcome]) -> None:
        super().__init__(work)
        self.channel = Full(fileno=self.channel.detach())
        self.channel.setblocking(False)


class Full(socket.socket):
    def send(self, *_: Any) -> int:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


def crash(node: Node, request: AnyRequest) -> Outcome:
    raise ZeroDivisionError


def killed(node: Node, request: AnyRequest) -> Outcome:
    os.kill(os.getpid(), 9)
    return done(node, request)


@pytest.mark.parametrize("function", [crash, killed], ids=["an exception", "a signal"])
def test_a_bug_in_an_operation_fails_that_request_only(bench: Bench, function: Function) -> None:
    bench.operation(BindDriver, function)
    bench.ask(bind(1))
    bench.run(lambda: bench.replies)
    assert failure(bench.replies[0]).code is ErrorCode.INTERNAL
    assert [event for event, _, _ in bench.events()] == ["asked", "done"]


def test_a_child_holds_nothing_of_its_parent(bench: Bench) -> None:
    def open_files(node: Node, request: AnyRequest) -> Outcome:
        paths = [f"/proc/self/fd/{number}" for number in range(3, 200)]
        links = [os.readlink(path) for path in paths if os.path.lexists(path)]
        return Outcome(Bound(id=1, audit=PENDING_HEAD, driver=" ".join(links), changed=False))

    bench.operation(BindDriver, open_files)
    bench.ask(bind(1))
    bench.run(lambda: bench.replies)
    assert isinstance(bench.replies[0], Bound)
    held = str(bench.replies[0].driver).split()
    assert [link.partition(":")[0] for link in held] == ["socket"], "only the channel to its parent"


def test_a_late_descriptor_is_closed(bench: Bench) -> None:
    gate = Gate(bench, lambda node, request: Outcome(Heartbeat(id=1, audit=PENDING_HEAD, alive=True), os.dup(2)))
    bench.operation(OpenPodResources, gate)
    before = len(os.listdir("/proc/self/fd"))
    bench.ask(OpenPodResources(id=1, wait_ms=1000))
    assert bench.dispatcher.timeout() == 6.0
    bench.now += 6
    bench.dispatcher.expire()
    gate.open()
    bench.run(lambda: not bench.calls)
    assert bench.descriptors == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_descriptor_is_passed_on(bench: Bench) -> None:
    def open_null(node: Node, request: AnyRequest) -> Outcome:
        return Outcome(Heartbeat(id=1, audit=PENDING_HEAD, alive=True), os.open("/dev/null", os.O_RDONLY))

    bench.operation(OpenPodResources, open_null)
    bench.ask(OpenPodResources(id=1))
    bench.run(lambda: bench.replies)
    assert os.readlink(f"/proc/self/fd/{bench.descriptors[0]}") == "/dev/null"
    assert not os.get_inheritable(bench.descriptors[0])
    os.close(bench.descriptors[0])
