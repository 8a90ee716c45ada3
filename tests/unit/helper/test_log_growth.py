"""How much a hostile client can make the helper write in a day, under the built-in rate limits."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qat_helper import dispatch
from qat_helper.audit.log import Caller
from qat_helper.errors import MESSAGE_LIMIT, OperationError
from qat_helper.operations.node import Node, Outcome
from qat_helper.operations.table import NAMES
from qat_helper.policy import ALL, BUILTIN_RATES, Policy
from qat_shared.messages import AnyRequest, BindDriver, DpdkDriver, ErrorCode, Failure
from qat_shared.pci import PciAddress
from support.dispatcher_bench import Bench
from support.longest_lines import longest_lines, longest_request

DAY = 86_400
ALLOWED = BUILTIN_RATES[ALL].burst + int(DAY * BUILTIN_RATES[ALL].per_second)
DOCUMENTED = 105_000_000
"""Bytes that the server's uid can make the helper write in the first day, as docs/helper.md states them."""
PROVISIONING = 1092 + 1091
"""Audited operations of a start, and of a change of all services, on 16 PFs with 64 VFs each; measured."""


class InProcess:
    """A child that performs its request in this process, so that a day takes seconds."""

    def __init__(self, work: Callable[[AnyRequest], Outcome]) -> None:
        self.channel = open(os.devnull, "rb")  # noqa: SIM115  the dispatcher closes it
        self._work = work
        self._requests: list[AnyRequest] = []

    def begin(self, request: AnyRequest) -> None:
        self._requests.append(request)

    def outcome(self) -> Outcome | None:
        return self._work(self._requests.pop()) if self._requests else None

    def dismiss(self) -> None:
        """It ends when it has no request."""


def failing(node: Node, request: AnyRequest) -> Outcome:
    """The longest reply: a failure, with letters that JSON escapes."""
    raise OperationError(ErrorCode.UNAVAILABLE, "\\" * MESSAGE_LIMIT, 2**31 - 1)


def test_the_longest_requests_of_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a request is allowed one is made, and then one more, which is not."""
    monkeypatch.setattr(dispatch, "Child", InProcess)
    bench = Bench(tmp_path, monkeypatch, Policy(uids=frozenset(), operations=NAMES))
    bench.operation(BindDriver, failing)
    request = BindDriver(
        id=2**32 - 1,
        address=PciAddress(0xFFFFFFFF, 0xFF, 0x1F, 7),
        driver=DpdkDriver.VFIO_PCI,
        reason="x" * 64,
    )
    begun, done = bench.now, 0
    step = 1 / BUILTIN_RATES[ALL].per_second
    while bench.now <= begun + DAY:
        bench.ask(request)
        if bench.calls:
            done += 1
            for call in (*bench.calls.values(), *bench.calls.values()):  # its outcome, then its end
                call()
        else:
            bench.now += step
    bench.audit.close()
    assert ALLOWED - 1 <= done <= ALLOWED + 1, "the limit let as many through as it says"
    refusal = bench.replies[-1]
    assert isinstance(refusal, Failure)
    assert refusal.rule == "rates.all"
    written = bench.log.stat().st_size
    assert written > ALLOWED * 1000, "the lines are long ones"
    assert written <= ALLOWED * longest_request() + longest_lines()["BindDriver"] <= DOCUMENTED


def test_strangers_of_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All other uids share one limit of the same size; each line is short."""
    bench = Bench(tmp_path, monkeypatch, Policy(uids=frozenset(), operations=NAMES))
    for second in range(0, DAY, step := int(1 / BUILTIN_RATES[ALL].per_second)):
        bench.now += step
        for uid in range(1 + (second == 0) * BUILTIN_RATES[ALL].burst):
            bench.dispatcher.reject(Caller(pid=2**31 - 1, uid=2**32 - 2 - uid, gid=2**32 - 2))
    bench.audit.close()
    written = bench.log.stat().st_size
    assert ALLOWED * 300 < written < ALLOWED * 500


def test_the_limit_suffices_for_provisioning_a_node_twice() -> None:
    assert BUILTIN_RATES[ALL].burst > PROVISIONING


def test_the_documentation_has_the_numbers() -> None:
    text = (Path(__file__).parents[3] / "docs/helper.md").read_text()
    rate = BUILTIN_RATES[ALL]
    assert f"`rates.all = {{ burst = {rate.burst}, per_second = {rate.per_second:g} }}`" in text
    assert f"{DOCUMENTED // 1_000_000} MB" in text
