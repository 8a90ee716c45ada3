"""The way of a request: children, deadlines, one operation for one device, and the lines in the audit log."""

import errno
import functools
import json
import os
import select
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forks import noted
from qat_helper import dispatch
from qat_helper.audit import AuditLog, Caller
from qat_helper.child import Child
from qat_helper.dispatch import Dispatcher
from qat_helper.errors import UNSIGNED, OperationError, denied
from qat_helper.node import Node, Outcome
from qat_helper.operations import NAMES, OPERATIONS
from qat_helper.policy import Policy, Rate
from qat_shared.messages import (
    AnyReply,
    AnyRequest,
    BindDriver,
    Bound,
    DpdkDriver,
    ErrorCode,
    Failure,
    Heartbeat,
    KubeletService,
    OpenKubeletSocket,
    ReadHeartbeat,
    ReleaseDriver,
)
from qat_shared.pci import PciAddress

VF = PciAddress(0, 0x6B, 0, 1)
CALLER = Caller(pid=10, uid=20, gid=30)
Function = Callable[[Node, Any], Outcome]


UNREAPED: list[int] = []
"""The children that have been started. The helper has the kernel reap its own, for all processes that it starts."""


class Bench:
    """A dispatcher whose clock and operations are the test's; children are real."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
        self.log = directory / "audit.jsonl"
        self.audit = AuditLog(self.log)
        self.now = 100.0
        self.replies: list[AnyReply] = []
        self.descriptors: list[int] = []
        self.calls: dict[int, Callable[[], None]] = {}
        self._table = dict(OPERATIONS)
        monkeypatch.setattr(dispatch, "OPERATIONS", self._table)
        monkeypatch.setattr(os, "fork", noted(os.fork, UNREAPED))
        node = Node(sysfs_root=directory, kubelet_dir=directory, server_gid=0, policy=policy)
        self.dispatcher = Dispatcher(node, self.audit, self.calls.__setitem__, self.calls.__delitem__, lambda: self.now)

    def operation(self, request: type[AnyRequest], function: Function, at_once: int = 16) -> None:
        self._table[request] = msgspec.structs.replace(self._table[request], function=function, at_once=at_once)

    def ask(self, request: AnyRequest, owner: object = None) -> None:
        self.dispatcher.ask(CALLER, request, self._answered, owner)

    def _answered(self, outcome: Outcome) -> None:
        self.replies.append(outcome.reply)
        if outcome.descriptor is not None:
            self.descriptors.append(outcome.descriptor)

    def run(self, until: Callable[[], object]) -> None:
        """Let children end until it is true."""
        while not until():
            poll = select.poll()
            for descriptor in self.calls:
                poll.register(descriptor, select.POLLIN)
            ready = poll.poll(20_000)
            assert ready, "no child has ended"
            self.calls[ready[0][0]]()

    def close(self) -> None:
        """Whatever children there are still: with their channels they end, and nobody waits for them."""
        for call in self.calls.values():
            assert isinstance(call, functools.partial)
            call.args[0].channel.close()
        UNREAPED[:] = [pid for pid in UNREAPED if not os.waitpid(pid, os.WNOHANG)[0]]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_bytes().splitlines()]

    def story(self) -> list[tuple[str, str, int]]:
        """Each line's event, verdict, and the line that it refers to."""
        return [(line["event"], line.get("verdict", ""), line.get("asked", 0)) for line in self.lines()]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench(tmp_path, monkeypatch, Policy(uids=frozenset(), operations=NAMES))
    with closing(bench.audit):
        yield bench
        bench.close()


def bind(number: int = 1, function: int = 1) -> BindDriver:
    address = PciAddress(0, 0x6B, 0, function)
    return BindDriver(id=number, address=address, driver=DpdkDriver.VFIO_PCI, reason="a test")


def bind_other(number: int) -> BindDriver:
    """Of a device of its own for each number."""
    return msgspec.structs.replace(bind(number), address=PciAddress(0, 0x6B, number // 8, number % 8))


def done(node: Node, request: AnyRequest) -> Outcome:
    return Outcome(Bound(id=request.id, audit=UNSIGNED, driver="vfio-pci", changed=True))


class Gate:
    """An operation that waits until it is let through, as one that is blocked in the kernel does."""

    def __init__(self, bench: Bench, outcome: Function = done) -> None:
        self._path = bench.log.with_name("gate")
        self._outcome = outcome
        os.mkfifo(self._path)

    def __call__(self, node: Node, request: AnyRequest) -> Outcome:
        with self._path.open("rb") as pipe:
            pipe.read()
        return self._outcome(node, request)

    def open(self) -> None:
        self._path.open("wb").close()

    def stand_open(self, bench: Bench, until: Callable[[], object]) -> None:
        """Let through whatever comes, and let children end, until it is true."""
        while not until():
            with suppress(OSError):  # nobody is at the gate just now
                os.close(os.open(self._path, os.O_WRONLY | os.O_NONBLOCK))
            for descriptor in list(bench.calls):
                if descriptor in bench.calls and select.select([descriptor], [], [], 0.01)[0]:
                    bench.calls[descriptor]()


def failure(reply: AnyReply) -> Failure:
    assert isinstance(reply, Failure)
    return reply


def test_an_operation_is_audited_before_and_after(bench: Bench) -> None:
    bench.operation(BindDriver, done)
    bench.ask(bind(number=5))
    assert bench.story() == [("asked", "", 0)], "the first line is there before anything is done"
    bench.now += 1.5
    bench.run(lambda: bench.replies)
    assert bench.replies == [Bound(id=5, audit=UNSIGNED, driver="vfio-pci", changed=True)]
    asked, ended = bench.lines()
    assert asked["peer"] == {"pid": 10, "uid": 20, "gid": 30}
    assert asked["arguments"] == {"address": "0000:6b:00.1", "driver": "vfio-pci"}
    assert (asked["operation"], asked["reason"]) == ("BindDriver", "a test")
    assert (ended["event"], ended["verdict"], ended["asked"]) == ("done", "ok", 1)
    assert ended["result"] == {"driver": "vfio-pci", "changed": True}
    assert ended["duration_ms"] == 1500


def test_no_child_and_no_descriptor_is_left(bench: Bench) -> None:
    bench.operation(BindDriver, done)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        bench.ask(bind(number))
        bench.run(lambda number=number: len(bench.replies) > number)  # type: ignore[misc]
    bench.run(lambda: not bench.calls)
    assert len(os.listdir("/proc/self/fd")) == before


def who(node: Node, request: AnyRequest) -> Outcome:
    """Tells which process did it."""
    return Outcome(Bound(id=request.id, audit=UNSIGNED, driver=str(os.getpid()), changed=True))


def test_a_child_does_what_waits_of_the_same_kind_and_ends_when_nothing_of_it_is_at_work(bench: Bench) -> None:
    bench.operation(BindDriver, who, at_once=2)
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
    bench.operation(BindDriver, gate, at_once=1)
    bench.ask(bind_other(1))

    def dropped(outcome: Outcome) -> None:
        bench.replies.append(outcome.reply)
        if len(bench.replies) == 2:  # the first of its answers
            bench.dispatcher.forget(peer)

    for number in (2, 3, 4):
        bench.dispatcher.ask(CALLER, bind_other(number), dropped, peer)
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
        reply = Bound(id=request.id, audit=UNSIGNED, driver=found, changed=False)
        return Outcome(reply, os.open("/dev/null", os.O_RDONLY))

    bench.operation(BindDriver, tell, at_once=1)
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

    bench.operation(BindDriver, end, at_once=2)
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


def test_one_operation_at_a_time_for_one_device(bench: Bench) -> None:
    gate = Gate(bench)
    bench.operation(BindDriver, gate)
    bench.ask(bind(1))
    bench.ask(bind(2))
    bench.ask(ReleaseDriver(id=3, address=VF))
    assert [failure(reply).code for reply in bench.replies] == [ErrorCode.BUSY] * 2
    bench.operation(BindDriver, done)
    bench.ask(bind(4, function=2))
    bench.run(lambda: len(bench.replies) == 3)
    assert bench.replies[-1].id == 4, "another device is not held up"
    gate.open()
    bench.run(lambda: len(bench.replies) == 4)
    bench.ask(bind(5))
    bench.run(lambda: len(bench.replies) == 5)
    assert isinstance(bench.replies[-1], Bound)
    assert [(event, verdict) for event, verdict, _ in bench.story()][:3] == [
        ("asked", ""),
        ("refused", "busy"),
        ("refused", "busy"),
    ]


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


def test_what_outlasts_its_deadline_is_answered_left_alone_and_audited_late(bench: Bench) -> None:
    gate = Gate(bench)
    bench.operation(BindDriver, gate)
    assert bench.dispatcher.timeout() is None
    bench.ask(bind(1))
    assert bench.dispatcher.timeout() == 5.0
    bench.dispatcher.expire()
    assert bench.replies == []
    bench.now += 5
    bench.dispatcher.expire()
    bench.dispatcher.expire()
    assert [failure(reply).code for reply in bench.replies] == [ErrorCode.TIMED_OUT]
    assert bench.dispatcher.timeout() is None, "nothing more to wake up for"
    bench.ask(bind(2))
    assert failure(bench.replies[-1]).code is ErrorCode.BUSY, "it is still at work"
    gate.open()
    bench.run(lambda: not bench.calls)
    assert len(bench.replies) == 2, "no second answer"
    assert bench.story() == [("asked", "", 0), ("refused", "busy", 0), ("late", "late", 1)]
    assert bench.lines()[-1]["result"]["changed"] is True
    bench.ask(bind(3))
    assert bench.calls, "and now the device is free"
    gate.open()
    bench.run(lambda: not bench.calls)


def test_a_descriptor_that_comes_too_late_is_closed(bench: Bench) -> None:
    gate = Gate(bench, lambda node, request: Outcome(Heartbeat(id=1, audit=UNSIGNED, alive=True), os.dup(2)))
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
        return Outcome(Heartbeat(id=1, audit=UNSIGNED, alive=True), os.open("/dev/null", os.O_RDONLY))

    bench.operation(OpenKubeletSocket, open_null)
    bench.ask(OpenKubeletSocket(id=1, service=KubeletService.REGISTRATION))
    bench.run(lambda: bench.replies)
    assert os.readlink(f"/proc/self/fd/{bench.descriptors[0]}") == "/dev/null"
    assert not os.get_inheritable(bench.descriptors[0])
    os.close(bench.descriptors[0])


def test_those_of_one_operation_that_cannot_end_keep_no_other_from_being_done(bench: Bench) -> None:
    gate = Gate(bench)
    bench.operation(BindDriver, gate, at_once=2)
    bench.operation(ReadHeartbeat, lambda node, request: Outcome(Heartbeat(id=9, audit=UNSIGNED, alive=True)))
    for number in range(1, 6):
        bench.ask(bind(number, function=number))
    assert len(bench.calls) == 2
    bench.ask(ReadHeartbeat(id=9, address=VF))
    bench.run(lambda: bench.replies)
    assert isinstance(bench.replies[0], Heartbeat)
    gate.stand_open(bench, lambda: len(bench.replies) == 6)


def test_what_waits_is_bounded_and_ends_with_who_asked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAX_WAITING", 3)
    gate = Gate(bench)
    bench.operation(BindDriver, gate, at_once=1)
    leaver = object()
    for number in range(1, 6):
        bench.ask(bind(number, function=number), leaver if number in (2, 3) else None)
    assert [failure(reply).code for reply in bench.replies] == [ErrorCode.BUSY], "the first runs, three wait"
    bench.dispatcher.forget(leaver)
    assert len(bench.calls) == 1
    gate.stand_open(bench, lambda: len(bench.lines()) == 9 and not bench.calls)
    assert Counter(event for event, _, _ in bench.story()) == {"asked": 4, "done": 4, "refused": 1}
    assert Counter(verdict for _, verdict, _ in bench.story())["failed"] == 2, "those were never begun"


def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **rates: Rate) -> Bench:
    policy = Policy(uids=frozenset(), operations=NAMES, addresses=frozenset({VF}), rates=rates)
    return Bench(tmp_path, monkeypatch, policy)


def test_audited_requests_have_an_allowance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = limited(tmp_path, monkeypatch, all=Rate(burst=3, per_second=10))
    bench.operation(BindDriver, done)
    for number in range(1, 6):
        bench.ask(bind(number))
        bench.run(lambda: not bench.calls)
    refused = [failure(reply) for reply in bench.replies if isinstance(reply, Failure)]
    assert [(reply.code, reply.rule) for reply in refused] == [(ErrorCode.BUSY, "rates.all")] * 2
    assert refused[0].message == (
        "more than 10 audited requests a second, after 3 at once: ask less often, or raise rates.all in the helper's "
        "policy file"
    )
    lines = bench.lines()
    assert len(lines) == 7, "the log does not grow by what is over it, but for the first"
    assert (lines[-1]["event"], lines[-1]["verdict"], lines[-1]["result"]["rule"]) == ("refused", "busy", "rates.all")
    bench.now += 0.2
    bench.ask(bind(6))
    bench.run(lambda: len(bench.replies) == 6)
    assert isinstance(bench.replies[-1], Bound)
    bench.ask(bind(7))
    bench.run(lambda: len(bench.replies) == 7)
    assert isinstance(bench.replies[-1], Bound)
    bench.ask(bind(8))
    assert len(bench.lines()) == 11, "still the same row of refusals"
    bench.now += 1
    for number in range(9, 13):
        bench.ask(bind(number))
        bench.run(lambda: not bench.calls)
    assert bench.lines()[-1]["verdict"] == "busy", "once it was full again, the next row has its line"
    bench.dispatcher.stop()
    assert bench.lines()[-1]["arguments"]["refused, too many"] == 4
    bench.audit.close()


def test_an_operation_may_have_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"ReadHeartbeat": Rate(burst=1, per_second=0.5), "BindDriver": Rate(burst=2, per_second=1)}
    bench = limited(tmp_path, monkeypatch, **rates)
    bench.operation(BindDriver, done)
    bench.operation(ReadHeartbeat, lambda node, request: Outcome(Heartbeat(id=2, audit=UNSIGNED, alive=True)))
    for number in range(4):
        for request in (bind(number), ReadHeartbeat(id=number, address=VF)):
            bench.ask(request)
            bench.run(lambda: not bench.calls)
    refused = [failure(reply) for reply in bench.replies if isinstance(reply, Failure)]
    assert Counter(reply.rule for reply in refused) == {"rates.ReadHeartbeat": 3, "rates.BindDriver": 2}
    assert refused[0].message.startswith("more than 0.5 ReadHeartbeat a second, after 1 at once: ")
    assert [line["result"]["rule"] for line in bench.lines() if line["event"] == "refused"] == [
        "rates.ReadHeartbeat",
        "rates.BindDriver",
    ]
    bench.audit.close()


def test_lines_about_refusals_count_as_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small limit that recovers at once, each refusal is the first in a row."""
    bench = limited(
        tmp_path, monkeypatch, all=Rate(burst=3, per_second=0.01), ReadHeartbeat=Rate(burst=1, per_second=1)
    )
    bench.operation(ReadHeartbeat, lambda node, request: Outcome(Heartbeat(id=1, audit=UNSIGNED, alive=True)))
    for number in range(8):
        bench.ask(ReadHeartbeat(id=number, address=VF))
        bench.run(lambda: not bench.calls)
        bench.now += number % 2
    assert [isinstance(reply, Failure) for reply in bench.replies] == [False, True] * 4
    assert bench.story() == [("refused", "busy", 0)] * 3, "the fourth is counted only"
    bench.audit.close()


def test_denied_reads_and_strangers_cannot_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = limited(tmp_path, monkeypatch, all=Rate(burst=3, per_second=10))
    elsewhere = PciAddress(0, 0x6B, 0, 2)
    for number in range(5):
        bench.ask(ReadHeartbeat(id=number, address=elsewhere))
    assert [failure(reply).rule for reply in bench.replies] == ["addresses"] * 5
    for uid in range(5):
        assert bench.dispatcher.turn_away(Caller(pid=1, uid=1000 + uid, gid=1)).rule == "server-uid"
    assert bench.story() == [("refused", "denied", 0)] * 6
    bench.dispatcher.stop()
    assert bench.lines()[-1]["arguments"] == {"ReadHeartbeat denied, not written": 2, "turned away, not written": 2}
    bench.audit.close()


def test_a_read_that_its_device_forbids_has_a_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(node: Node, request: AnyRequest) -> Outcome:
        raise denied("physical-functions-only", "it is a VF")

    bench.operation(ReadHeartbeat, forbidden)
    bench.ask(ReadHeartbeat(id=1, address=VF))
    bench.run(lambda: bench.replies)
    assert failure(bench.replies[0]).rule == "physical-functions-only"
    assert bench.story() == [("refused", "denied", 0)]
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(bench.audit, "_descriptor", full)
    bench.ask(ReadHeartbeat(id=2, address=VF))
    bench.run(lambda: len(bench.replies) == 2)
    assert failure(bench.replies[1]).code is ErrorCode.AUDIT, "no denial without its line"
    monkeypatch.undo()
    os.close(full)


def test_more_than_may_run_wait_and_time_out_unbegun(bench: Bench) -> None:
    gate = Gate(bench)
    bench.operation(BindDriver, gate, at_once=1)
    bench.ask(bind(1, function=1))
    bench.ask(bind(2, function=2))
    assert len(bench.calls) == 1
    bench.now += 5
    bench.dispatcher.expire()
    assert [failure(reply).code for reply in bench.replies] == [ErrorCode.TIMED_OUT] * 2
    bench.ask(bind(3, function=2))
    gate.open()
    bench.run(lambda: len(bench.calls) == 1 and len(bench.lines()) >= 5)
    gate.open()
    bench.run(lambda: len(bench.replies) == 3)
    assert isinstance(bench.replies[-1], Bound)
    assert [event for event, _, _ in bench.story()] == ["asked", "asked", "done", "asked", "late", "done"]


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
        return Outcome(Bound(id=1, audit=UNSIGNED, driver=" ".join(links), changed=False))

    bench.operation(BindDriver, open_files)
    bench.ask(bind(1))
    bench.run(lambda: bench.replies)
    assert isinstance(bench.replies[0], Bound)
    held = str(bench.replies[0].driver).split()
    assert [link.partition(":")[0] for link in held] == ["socket"], "only the channel to its parent"


def test_a_log_that_cannot_be_written_refuses_all_but_heartbeats(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = bench.log.with_name("begun")

    def touch(node: Node, request: AnyRequest) -> Outcome:
        begun.touch()
        return done(node, request)

    bench.operation(BindDriver, touch)
    bench.operation(ReadHeartbeat, lambda node, request: Outcome(Heartbeat(id=2, audit=UNSIGNED, alive=True)))
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(bench.audit, "_descriptor", full)
    bench.ask(bind(1))
    bench.ask(ReadHeartbeat(id=2, address=VF))
    bench.run(lambda: len(bench.replies) == 2)
    assert failure(bench.replies[0]).code is ErrorCode.AUDIT
    assert isinstance(bench.replies[1], Heartbeat)
    assert not begun.exists()
    monkeypatch.undo()
    os.close(full)


def test_policy_comes_first_and_a_denial_is_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(uids=frozenset(), operations=frozenset({"BindDriver"}), drivers=frozenset({DpdkDriver.IGB_UIO}))
    bench = Bench(tmp_path, monkeypatch, policy)
    with closing(bench.audit):
        bench.ask(bind(1))
        bench.ask(ReadHeartbeat(id=2, address=VF))
    assert [(failure(reply).code, failure(reply).rule) for reply in bench.replies] == [
        (ErrorCode.DENIED, "drivers"),
        (ErrorCode.DENIED, "operations"),
    ]
    assert not bench.calls, "no child was started"
    assert bench.story() == [("refused", "denied", 0)] * 2
    assert bench.lines()[0]["result"]["rule"] == "drivers"


def test_the_last_line_tells_what_was_counted_and_what_goes_on(bench: Bench) -> None:
    gate = Gate(bench)
    bench.operation(BindDriver, gate)
    bench.operation(ReadHeartbeat, lambda node, request: Outcome(Heartbeat(id=2, audit=UNSIGNED, alive=True)))
    bench.ask(ReadHeartbeat(id=2, address=VF))
    bench.run(lambda: bench.replies)
    bench.ask(bind(1))
    bench.dispatcher.stop()
    assert bench.lines()[-1]["arguments"] == {
        "ReadHeartbeat": 1,
        "unfinished": "BindDriver (asked 1)",
        "unfinished_number": 1,
    }
    gate.open()
    bench.run(lambda: not bench.calls)
