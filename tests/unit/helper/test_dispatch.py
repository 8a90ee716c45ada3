"""The path of a request: deadlines, one operation per device, and audit lines."""

import os
from collections import Counter
from contextlib import closing
from itertools import count
from pathlib import Path

import msgspec
import pytest

from qat_helper import dispatch
from qat_helper.errors import PENDING_HEAD, denied
from qat_helper.operations.node import Node, Outcome
from qat_helper.operations.table import MAX_CHILDREN, OPERATIONS
from qat_helper.policy import Policy
from qat_shared.messages import (
    AnyRequest,
    BindDriver,
    Bound,
    DpdkDriver,
    ErrorCode,
    Heartbeat,
    ReadDeviceConfig,
    ReadHeartbeat,
    ReleaseDriver,
    Service,
    SetServices,
)
from qat_shared.pci import PciAddress
from support.dispatcher_bench import VF, Bench, Gate, bind, bind_device, done, failure, report_pid


def test_an_operation_is_audited_before_and_after(bench: Bench) -> None:
    bench.operation(BindDriver, done)
    bench.ask(bind(number=5))
    assert bench.events() == [("asked", "", 0)], "the first line is written before the operation begins"
    bench.now += 1.5
    bench.run(lambda: bench.replies)
    assert bench.replies == [Bound(id=5, audit=PENDING_HEAD, driver="vfio-pci", changed=True)]
    asked, ended = bench.lines()
    assert asked["peer"] == {"pid": 10, "uid": 20, "gid": 30}
    assert asked["arguments"] == {"address": "0000:6b:00.1", "driver": "vfio-pci"}
    assert (asked["operation"], asked["reason"]) == ("BindDriver", "a test")
    assert (ended["event"], ended["verdict"], ended["asked"]) == ("done", "ok", 1)
    assert ended["result"] == {"driver": "vfio-pci", "changed": True}
    assert ended["duration_ms"] == 1500


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
    assert bench.replies[-1].id == 4, "another device is not delayed"
    gate.open()
    bench.run(lambda: len(bench.replies) == 4)
    bench.ask(bind(5))
    bench.run(lambda: len(bench.replies) == 5)
    assert isinstance(bench.replies[-1], Bound)
    assert [(event, verdict) for event, verdict, _ in bench.events()][:3] == [
        ("asked", ""),
        ("refused", "busy"),
        ("refused", "busy"),
    ]


def test_an_overdue_operation_times_out_keeps_running_and_is_audited_late(bench: Bench) -> None:
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
    assert bench.dispatcher.timeout() is None, "no deadline is left"
    bench.ask(bind(2))
    assert failure(bench.replies[-1]).code is ErrorCode.BUSY, "it is still running"
    gate.open()
    bench.run(lambda: not bench.calls)
    assert len(bench.replies) == 2, "no second reply"
    assert bench.events() == [("asked", "", 0), ("refused", "busy", 0), ("late", "late", 1)]
    assert bench.lines()[-1]["result"]["changed"] is True
    bench.ask(bind(3))
    assert bench.calls, "the device is free now"
    gate.open()
    bench.run(lambda: not bench.calls)


def test_those_of_one_operation_that_cannot_end_keep_no_other_from_being_done(bench: Bench) -> None:
    gate = Gate(bench)
    bench.operation(BindDriver, gate, max_children=2)
    bench.operation(ReadHeartbeat, lambda node, request: Outcome(Heartbeat(id=9, audit=PENDING_HEAD, alive=True)))
    for number in range(1, 6):
        bench.ask(bind(number, function=number))
    assert len(bench.calls) == 2
    bench.ask(ReadHeartbeat(id=9, address=VF))
    bench.run(lambda: bench.replies)
    assert isinstance(bench.replies[0], Heartbeat)
    gate.stay_open(bench, lambda: len(bench.replies) == 6)


def test_blocked_operations_of_all_kinds_share_one_limit_and_each_kind_keeps_its_least(bench: Bench) -> None:
    gate = Gate(bench)
    number = count(1)

    def running(kind: type[AnyRequest], *requests: AnyRequest) -> int:
        """Ask for these. Returns how many begin."""
        before = len(bench.calls)
        bench.operation(kind, gate)
        for request in requests:
            bench.ask(msgspec.structs.replace(request, id=next(number)))
        return len(bench.calls) - before

    least = {row.name: row.least for row in OPERATIONS.values() if row.max_children}
    pfs = [PciAddress(0, 0x70 + index, 0, 0) for index in range(16)]
    spare = MAX_CHILDREN - sum(least.values())
    assert 0 < spare < 15, "one kind alone would take all"
    assert running(BindDriver, *(bind_device(index) for index in range(16))) == least["BindDriver"] + spare
    assert running(ReadHeartbeat, *(ReadHeartbeat(id=1, address=pf) for pf in pfs)) == least["ReadHeartbeat"]
    services = (Service.DC,)
    assert running(SetServices, *(SetServices(id=1, address=pf, services=services) for pf in pfs)) == 1
    assert running(ReadDeviceConfig, *(ReadDeviceConfig(id=1, address=pf) for pf in pfs)) == 1
    gate.stay_open(bench, lambda: len(bench.replies) == 64)
    bench.run(lambda: not bench.calls)


def test_an_idle_child_of_one_kind_makes_room_for_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    least = sum(row.least for row in OPERATIONS.values() if row.max_children)
    monkeypatch.setattr(dispatch, "MAX_CHILDREN", least + 1)
    gate = Gate(bench, report_pid)
    bench.operation(BindDriver, lambda node, request: (gate if request.id == 1 else report_pid)(node, request))
    bench.operation(ReleaseDriver, gate)
    bench.ask(bind_device(1))
    bench.ask(bind_device(2))
    bench.run(lambda: len(bench.replies) == 1)
    assert len(bench.calls) == 2, "the second bind's child is idle"
    for function in (3, 4):
        bench.ask(ReleaseDriver(id=function, address=PciAddress(0, 0x70, 0, function)))
    bench.run(lambda: bench.running("ReleaseDriver") == 2)
    gate.stay_open(bench, lambda: len(bench.replies) == 4)


def test_the_queue_is_bounded_and_dropped_with_its_client(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAX_QUEUED", 3)
    gate = Gate(bench)
    bench.operation(BindDriver, gate, max_children=1)
    leaver = object()
    for number in range(1, 6):
        bench.ask(bind(number, function=number), leaver if number in (2, 3) else None)
    assert [failure(reply).code for reply in bench.replies] == [ErrorCode.BUSY], "the first runs, three wait"
    bench.dispatcher.cancel(leaver)
    assert len(bench.calls) == 1
    gate.stay_open(bench, lambda: len(bench.lines()) == 9 and not bench.calls)
    assert Counter(event for event, _, _ in bench.events()) == {"asked": 4, "done": 4, "refused": 1}
    assert Counter(verdict for _, verdict, _ in bench.events())["failed"] == 2, "those never began"


def test_a_denied_read_has_an_audit_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(node: Node, request: AnyRequest) -> Outcome:
        raise denied("physical-functions-only", "it is a VF")

    bench.operation(ReadHeartbeat, forbidden)
    bench.ask(ReadHeartbeat(id=1, address=VF))
    bench.run(lambda: bench.replies)
    assert failure(bench.replies[0]).rule == "physical-functions-only"
    assert bench.events() == [("refused", "denied", 0)]
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(bench.audit, "_descriptor", full)
    bench.ask(ReadHeartbeat(id=2, address=VF))
    bench.run(lambda: len(bench.replies) == 2)
    assert failure(bench.replies[1]).code is ErrorCode.AUDIT, "no denial without its audit line"
    monkeypatch.undo()
    os.close(full)


def test_jobs_beyond_the_limit_wait_and_time_out_unbegun(bench: Bench) -> None:
    gate = Gate(bench)
    bench.operation(BindDriver, gate, max_children=1)
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
    assert [event for event, _, _ in bench.events()] == ["asked", "asked", "done", "asked", "late", "done"]


def test_a_log_that_cannot_be_written_refuses_all_but_heartbeats(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = bench.log.with_name("begun")

    def touch(node: Node, request: AnyRequest) -> Outcome:
        begun.touch()
        return done(node, request)

    bench.operation(BindDriver, touch)
    bench.operation(ReadHeartbeat, lambda node, request: Outcome(Heartbeat(id=2, audit=PENDING_HEAD, alive=True)))
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
    assert bench.events() == [("refused", "denied", 0)] * 2
    assert bench.lines()[0]["result"]["rule"] == "drivers"


def test_the_last_line_has_the_counters_and_the_unfinished_operations(bench: Bench) -> None:
    gate = Gate(bench)
    bench.operation(BindDriver, gate)
    bench.operation(ReadHeartbeat, lambda node, request: Outcome(Heartbeat(id=2, audit=PENDING_HEAD, alive=True)))
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
