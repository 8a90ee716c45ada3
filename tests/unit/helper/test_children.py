"""The dispatcher's children: what one does after another, what it keeps, what becomes of the work of one that ends."""

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
from qat_helper.node import Node, Outcome
from qat_shared.messages import (
    AnyRequest,
    BindDriver,
    Bound,
    ErrorCode,
    Failure,
    Heartbeat,
    KubeletService,
    OpenKubeletSocket,
)
from support.dispatcher_bench import CALLER, Bench, Function, Gate, bind, bind_other, done, failure, who


def test_no_child_and_no_descriptor_is_left(bench: Bench) -> None:
    bench.operation(BindDriver, done)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        bench.ask(bind(number))
        bench.run(lambda number=number: len(bench.replies) > number)  # type: ignore[misc]
    bench.run(lambda: not bench.calls)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_does_what_waits_of_the_same_kind_and_ends_when_nothing_of_it_is_at_work(bench: Bench) -> None:
    bench.operation(BindDriver, who, max_children=2)
    for number in range(20):
        bench.ask(bind_other(number))
    bench.run(lambda: len(bench.replies) == 20)
    assert len({reply.driver for reply in bench.replies if isinstance(reply, Bound)}) <= 2
    assert sorted(reply.id for reply in bench.replies) == list(range(20))
    asked = [line["sequence"] for line in bench.lines() if line["event"] == "asked"]
    assert Counter(bench.story()) == Counter([("asked", "", 0)] * 20 + [("done", "ok", number) for number in asked])
    bench.run(lambda: not bench.calls)


def test_a_child_is_one_peers_and_makes_room_for_anothers(bench: Bench) -> None:
    """With one child that cannot end, and an idle one: all that this operation may have."""
    gate = Gate(bench, who)
    bench.operation(BindDriver, lambda node, request: gate(node, request) if request.id == 1 else who(node, request), 2)
    one, other = object(), object()
    bench.ask(bind_other(1), one)
    bench.ask(bind_other(2), one)
    bench.run(lambda: len(bench.replies) == 1)
    assert len(bench.calls) == 2, "it is kept, since another of its kind is at work"
    bench.ask(bind_other(3), one)
    bench.run(lambda: len(bench.replies) == 2)
    bench.ask(bind_other(4), other)
    bench.run(lambda: len(bench.replies) == 3)
    second, third, fourth = (reply.driver for reply in bench.replies if isinstance(reply, Bound))
    assert second == third
    assert third != fourth
    gate.open()
    bench.run(lambda: not bench.calls)
    assert len(bench.replies) == 4


def test_few_children_are_idle(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have been so longest end, whatever else of their kind is at work: they have memory."""
    monkeypatch.setattr(dispatch, "MAX_IDLE", 2)
    gate = Gate(bench, who)
    bench.operation(BindDriver, lambda node, request: gate(node, request) if request.id == 1 else who(node, request), 8)
    for number in range(1, 9):
        bench.ask(bind_other(number))
    assert len(bench.calls) == 8
    bench.run(lambda: len(bench.replies) == 7 and len(bench.calls) == 1 + 2)
    bench.ask(bind_other(9))
    bench.run(lambda: len(bench.replies) == 8)
    *before, last = (reply.driver for reply in bench.replies if isinstance(reply, Bound))
    assert last in before, "those that are left are of use"
    gate.open()
    bench.run(lambda: not bench.calls)


def test_a_peer_that_goes_while_no_process_can_be_had(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is not taken, so that it is dropped: what else it has asked for is not begun, none is ended twice."""
    gate, peer = Gate(bench), object()
    bench.operation(BindDriver, gate, max_children=1)
    bench.ask(bind_other(1))

    def dropped(outcome: Outcome) -> None:
        bench.replies.append(outcome.reply)
        if len(bench.replies) == 2:  # the first of its answers
            bench.dispatcher.cancel(peer)

    for number in (2, 3, 4):
        bench.dispatcher.submit(CALLER, bind_other(number), dropped, peer)
    bench.ask(bind_other(5))

    def none_to_be_had(work: Callable[[AnyRequest], Outcome]) -> None:
        monkeypatch.setattr(dispatch, "Child", Child)  # the next one, there is
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(dispatch, "Child", none_to_be_had)
    gate.stand_open(bench, lambda: not bench.calls)
    assert sorted(reply.id for reply in bench.replies) == [1, 2, 3, 4, 5]
    ended = Counter(line["asked"] for line in bench.lines() if line["event"] == "done")
    assert ended == {line["sequence"]: 1 for line in bench.lines() if line["event"] == "asked"}


def test_a_child_keeps_nothing_of_what_it_has_done(bench: Bench) -> None:
    """It passes descriptors, and fails, and has but its channel open after each."""

    def tell(node: Node, request: AnyRequest) -> Outcome:
        found = f"{os.getpid()} {len(os.listdir('/proc/self/fd')) - 1}"  # without the one that lists them
        if request.id % 2:
            raise OperationError(ErrorCode.UNAVAILABLE, found)
        reply = Bound(id=request.id, audit=PENDING_HEAD, driver=found, changed=False)
        return Outcome(reply, os.open("/dev/null", os.O_RDONLY))

    bench.operation(BindDriver, tell, max_children=1)
    for number in range(6):
        bench.ask(bind_other(number))
    bench.run(lambda: len(bench.replies) == 6)
    told = {reply.driver if isinstance(reply, Bound) else failure(reply).message for reply in bench.replies}
    assert len(told) == 1, "the same child, with as many descriptors"
    assert len(bench.descriptors) == 3
    for descriptor in bench.descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("idle", [False, True])
def test_what_a_killed_child_had_to_do_has_failed_and_all_else_is_done(bench: Bench, idle: bool) -> None:
    """As by the kernel, when memory is short: while it does something, or between two requests."""
    gate = Gate(bench, who)

    def end(node: Node, request: AnyRequest) -> Outcome:
        if request.id == 2 and not idle:
            os.kill(os.getpid(), signal.SIGKILL)
        return gate(node, request) if request.id == 1 else who(node, request)

    bench.operation(BindDriver, end, max_children=2)
    for number in (1, 2, 3):
        bench.ask(bind_other(number))
    bench.run(lambda: len(bench.replies) == 2)
    if idle:
        (pid,) = {int(reply.driver or "") for reply in bench.replies if isinstance(reply, Bound)}
        os.kill(pid, signal.SIGKILL)
        bench.run(lambda: len(bench.calls) == 1)
    bench.ask(bind_other(4))
    bench.run(lambda: len(bench.replies) == 3)
    gate.open()
    bench.run(lambda: not bench.calls)
    failed = [reply for reply in bench.replies if isinstance(reply, Failure)]
    assert [(reply.id, reply.code) for reply in failed] == ([] if idle else [(2, ErrorCode.INTERNAL)])
    assert Counter(line.get("verdict") for line in bench.lines() if line["event"] == "done") == Counter(
        {"ok": 4} if idle else {"ok": 3, "failed": 1}
    )


def test_what_a_child_cannot_be_told_has_failed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_defect_is_that_requests_failure(bench: Bench, function: Function) -> None:
    bench.operation(BindDriver, function)
    bench.ask(bind(1))
    bench.run(lambda: bench.replies)
    assert failure(bench.replies[0]).code is ErrorCode.INTERNAL
    assert [event for event, _, _ in bench.story()] == ["asked", "done"]


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


def test_a_descriptor_that_comes_too_late_is_closed(bench: Bench) -> None:
    gate = Gate(bench, lambda node, request: Outcome(Heartbeat(id=1, audit=PENDING_HEAD, alive=True), os.dup(2)))
    bench.operation(OpenKubeletSocket, gate)
    before = len(os.listdir("/proc/self/fd"))
    bench.ask(OpenKubeletSocket(id=1, service=KubeletService.REGISTRATION, wait_ms=1000))
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

    bench.operation(OpenKubeletSocket, open_null)
    bench.ask(OpenKubeletSocket(id=1, service=KubeletService.REGISTRATION))
    bench.run(lambda: bench.replies)
    assert os.readlink(f"/proc/self/fd/{bench.descriptors[0]}") == "/dev/null"
    assert not os.get_inheritable(bench.descriptors[0])
    os.close(bench.descriptors[0])
