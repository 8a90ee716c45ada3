"""Rate limits: how many requests the helper accepts, and which refusals get audit lines."""

from collections import Counter
from pathlib import Path

import pytest

from qat_helper.audit.log import Caller
from qat_helper.errors import PENDING_HEAD
from qat_helper.operations.node import Outcome
from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy, Rate
from qat_shared.messages import (
    BindDriver,
    Bound,
    ErrorCode,
    Failure,
    Heartbeat,
    ReadHeartbeat,
)
from qat_shared.pci import PciAddress
from support.dispatcher_bench import VF, Bench, bind, done, failure


def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **rates: Rate) -> Bench:
    policy = Policy(uids=frozenset(), operations=NAMES, addresses=frozenset({VF}), rates=rates)
    return Bench(tmp_path, monkeypatch, policy)


def test_audited_requests_are_rate_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = limited(tmp_path, monkeypatch, all=Rate(burst=3, per_second=10))
    bench.operation(BindDriver, done)
    for number in range(1, 6):
        bench.ask(bind(number))
        bench.run(lambda: not bench.calls)
    refused = [failure(reply) for reply in bench.replies if isinstance(reply, Failure)]
    assert [(reply.code, reply.rule) for reply in refused] == [(ErrorCode.BUSY, "rates.all")] * 2
    assert refused[0].message == (
        "rate limit: 3 audited requests at once, then 10 a second; send fewer, or raise rates.all in the helper's "
        "policy file"
    )
    lines = bench.lines()
    assert len(lines) == 7, "of the refusals, only the first is in the log"
    assert (lines[-1]["event"], lines[-1]["verdict"], lines[-1]["result"]["rule"]) == ("refused", "busy", "rates.all")
    bench.now += 0.2
    bench.ask(bind(6))
    bench.run(lambda: len(bench.replies) == 6)
    assert isinstance(bench.replies[-1], Bound)
    bench.ask(bind(7))
    bench.run(lambda: len(bench.replies) == 7)
    assert isinstance(bench.replies[-1], Bound)
    bench.ask(bind(8))
    assert len(bench.lines()) == 11, "still the same series of refusals"
    bench.now += 1
    for number in range(9, 13):
        bench.ask(bind(number))
        bench.run(lambda: not bench.calls)
    assert bench.lines()[-1]["verdict"] == "busy", "after the bucket was full again, the next series has its line"
    bench.dispatcher.stop()
    assert bench.lines()[-1]["arguments"]["refused, too many"] == 4
    bench.audit.close()


def test_an_operation_can_have_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"ReadHeartbeat": Rate(burst=1, per_second=0.5), "BindDriver": Rate(burst=2, per_second=1)}
    bench = limited(tmp_path, monkeypatch, **rates)
    bench.operation(BindDriver, done)
    bench.operation(ReadHeartbeat, lambda node, request: Outcome(Heartbeat(id=2, audit=PENDING_HEAD, alive=True)))
    for number in range(4):
        for request in (bind(number), ReadHeartbeat(id=number, address=VF)):
            bench.ask(request)
            bench.run(lambda: not bench.calls)
    refused = [failure(reply) for reply in bench.replies if isinstance(reply, Failure)]
    assert Counter(reply.rule for reply in refused) == {"rates.ReadHeartbeat": 3, "rates.BindDriver": 2}
    assert refused[0].message.startswith("rate limit: 1 ReadHeartbeat at once, then 0.5 a second; ")
    assert [line["result"]["rule"] for line in bench.lines() if line["event"] == "refused"] == [
        "rates.ReadHeartbeat",
        "rates.BindDriver",
    ]
    bench.audit.close()


def test_lines_about_refusals_count_as_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small bucket that refills at once, each refusal is the first of a series."""
    bench = limited(
        tmp_path, monkeypatch, all=Rate(burst=3, per_second=0.01), ReadHeartbeat=Rate(burst=1, per_second=1)
    )
    bench.operation(ReadHeartbeat, lambda node, request: Outcome(Heartbeat(id=1, audit=PENDING_HEAD, alive=True)))
    for number in range(8):
        bench.ask(ReadHeartbeat(id=number, address=VF))
        bench.run(lambda: not bench.calls)
        bench.now += number % 2
    assert [isinstance(reply, Failure) for reply in bench.replies] == [False, True] * 4
    assert bench.events() == [("refused", "busy", 0)] * 3, "the fourth is only counted"
    bench.audit.close()


def test_denied_reads_and_rejected_uids_cannot_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = limited(tmp_path, monkeypatch, all=Rate(burst=3, per_second=10))
    elsewhere = PciAddress(0, 0x6B, 0, 2)
    for number in range(5):
        bench.ask(ReadHeartbeat(id=number, address=elsewhere))
    assert [failure(reply).rule for reply in bench.replies] == ["addresses"] * 5
    for uid in range(5):
        assert bench.dispatcher.reject(Caller(pid=1, uid=1000 + uid, gid=1)).rule == "server-uid"
    assert bench.events() == [("refused", "denied", 0)] * 6
    bench.dispatcher.stop()
    assert bench.lines()[-1]["arguments"] == {"ReadHeartbeat denied, not written": 2, "turned away, not written": 2}
    bench.audit.close()
