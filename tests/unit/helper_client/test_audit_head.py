"""The checks on successive heads of the helper's audit log."""

import pytest

from qat_server.helper_client.audit_head import AuditHeadMonitor
from qat_server.instrumentation.counters import Counters
from qat_shared.messages import AuditHead

A, B = "ab" * 32, "cd" * 32

HEADS = {
    "no head": ([], 0, ""),
    "the first is taken as it is": ([(7, A)], 0, ""),
    "it grows": ([(7, A), (8, B), (30, A)], 0, ""),
    "nothing was written in between": ([(7, A), (7, A), (7, A)], 0, ""),
    "it went back": ([(7, A), (6, A)], 1, "went back to line 6 (abababababab) after line 7 (abababababab)"),
    "it started again": ([(7, A), (1, B)], 1, "went back to line 1 (cdcdcdcdcdcd) after line 7"),
    "the same line is another": ([(7, A), (7, B)], 1, "has another hash for line 7 (cdcdcdcdcdcd) after line 7"),
    "a break is reported once": ([(7, A), (1, B), (1, B), (2, A), (9, A)], 1, "went back to line 1"),
    "the next break is reported too": (
        [(7, A), (1, B), (2, A), (1, B)],
        2,
        "went back to line 1 (cdcdcdcdcdcd) after line 2",
    ),
}


@pytest.mark.parametrize(("heads", "breaks", "text"), HEADS.values(), ids=HEADS)
def test_heads(heads: list[tuple[int, str]], breaks: int, text: str, caplog: pytest.LogCaptureFixture) -> None:
    counters = Counters()
    monitor = AuditHeadMonitor(counters)
    for sequence, digest in heads:
        monitor.update(AuditHead(sequence=sequence, hash=digest))
    assert counters.audit_breaks == breaks
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == breaks
    assert text in monitor.last_break
    assert bool(monitor.last_break) == bool(breaks)
    assert monitor.head == (AuditHead(sequence=heads[-1][0], hash=heads[-1][1]) if heads else None)
