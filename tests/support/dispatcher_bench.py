"""The helper's dispatcher with the test's clock and operations, and real child processes."""

import functools
import json
import os
import select
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qat_helper import dispatch, job
from qat_helper.audit.log import AuditLog, Caller
from qat_helper.dispatch import Dispatcher
from qat_helper.errors import PENDING_HEAD
from qat_helper.operations.node import Node, Outcome
from qat_helper.operations.table import OPERATIONS
from qat_helper.policy import Policy
from qat_shared.messages import (
    AnyReply,
    AnyRequest,
    BindDriver,
    Bound,
    DpdkDriver,
    Failure,
)
from qat_shared.pci import PciAddress
from support.forks import recording_fork

VF = PciAddress(0, 0x6B, 0, 1)
CALLER = Caller(pid=10, uid=20, gid=30)
Function = Callable[[Node, Any], Outcome]
"""An operation's function, as in the table of operations."""
UNREAPED: list[int] = []
"""Children started so far. In the helper itself, the kernel reaps them."""


class Bench:
    """A dispatcher with the test's clock and operations; children are real."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
        self.log = directory / "audit.jsonl"
        self.audit = AuditLog(self.log)
        self.now = 100.0
        self.replies: list[AnyReply] = []
        self.descriptors: list[int] = []
        self.calls: dict[int, Callable[[], None]] = {}
        self._table = dict(OPERATIONS)
        for module in (dispatch, job):
            monkeypatch.setattr(module, "OPERATIONS", self._table)
        monkeypatch.setattr(os, "fork", recording_fork(os.fork, UNREAPED))
        node = Node(sysfs_root=directory, kubelet_dir=directory, server_gid=0, policy=policy)
        self.dispatcher = Dispatcher(node, self.audit, self.calls.__setitem__, self.calls.__delitem__, lambda: self.now)

    def operation(self, request: type[AnyRequest], function: Function, max_children: int = 16) -> None:
        self._table[request] = msgspec.structs.replace(
            self._table[request], function=function, max_children=max_children
        )

    def ask(self, request: AnyRequest, owner: object = None) -> None:
        self.dispatcher.submit(CALLER, request, self._answered, owner)

    def running(self, operation: str) -> int:
        """How many requests of an operation are in children."""
        return sum(job.operation.name == operation for job in self.dispatcher._running.values())

    def _answered(self, outcome: Outcome) -> None:
        self.replies.append(outcome.reply)
        if outcome.descriptor is not None:
            self.descriptors.append(outcome.descriptor)

    def run(self, until: Callable[[], object]) -> None:
        """Handle children until the condition is true."""
        while not until():
            poll = select.poll()
            for descriptor in self.calls:
                poll.register(descriptor, select.POLLIN)
            ready = poll.poll(20_000)
            assert ready, "no child has sent a result"
            self.calls[ready[0][0]]()

    def close(self) -> None:
        """Close the channels of the remaining children, which makes them exit; nobody waits for them."""
        for call in self.calls.values():
            assert isinstance(call, functools.partial)
            call.args[0].channel.close()
        UNREAPED[:] = [pid for pid in UNREAPED if not os.waitpid(pid, os.WNOHANG)[0]]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_bytes().splitlines()]

    def events(self) -> list[tuple[str, str, int]]:
        """Each audit line's event, verdict, and the sequence number in `asked`."""
        return [(line["event"], line.get("verdict", ""), line.get("asked", 0)) for line in self.lines()]


def bind(number: int = 1, function: int = 1) -> BindDriver:
    address = PciAddress(0, 0x6B, 0, function)
    return BindDriver(id=number, address=address, driver=DpdkDriver.VFIO_PCI, reason="a test")


def bind_device(number: int) -> BindDriver:
    """A BindDriver for a different device per number."""
    return msgspec.structs.replace(bind(number), address=PciAddress(0, 0x6B, number // 8, number % 8))


def done(node: Node, request: AnyRequest) -> Outcome:
    return Outcome(Bound(id=request.id, audit=PENDING_HEAD, driver="vfio-pci", changed=True))


def report_pid(node: Node, request: AnyRequest) -> Outcome:
    """An operation that returns the pid of its process."""
    return Outcome(Bound(id=request.id, audit=PENDING_HEAD, driver=str(os.getpid()), changed=True))


class Gate:
    """An operation that blocks until the gate opens, like one that is blocked in the kernel."""

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

    def stay_open(self, bench: Bench, until: Callable[[], object]) -> None:
        """Let all operations through and handle children until the condition is true."""
        while not until():
            with suppress(OSError):  # no operation is waiting
                os.close(os.open(self._path, os.O_WRONLY | os.O_NONBLOCK))
            for descriptor in list(bench.calls):
                if descriptor in bench.calls and select.select([descriptor], [], [], 0.01)[0]:
                    bench.calls[descriptor]()


def failure(reply: AnyReply) -> Failure:
    assert isinstance(reply, Failure)
    return reply
