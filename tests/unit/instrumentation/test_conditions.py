"""Conditions: one log line for each, for as long as every reconcile reports it."""

import pytest

from qat_server.instrumentation.conditions import Conditions

Reconciles = list[list[tuple[str, int]]]
"""The conditions (message, field) that each reconcile reports."""

CASES: dict[str, tuple[Reconciles, list[str]]] = {
    "none": ([[], []], []),
    "it lasts": ([[("a", 1)], [("a", 1)], [("a", 1)]], ["a"]),
    "twice in one reconcile": ([[("a", 1), ("a", 1)]], ["a"]),
    "over and back": ([[("a", 1)], [], [("a", 1)]], ["a", "a"]),
    "other fields": ([[("a", 1)], [("a", 2)]], ["a", "a"]),
    "one more": ([[("a", 1)], [("a", 1), ("b", 1)]], ["a", "b"]),
}


@pytest.mark.parametrize(("reconciles", "logged"), CASES.values(), ids=CASES)
def test_conditions(reconciles: Reconciles, logged: list[str], caplog: pytest.LogCaptureFixture) -> None:
    conditions = Conditions()
    for reports in reconciles:
        for message, number in reports:
            conditions.report(message, number=number)
        conditions.settle()
    assert [record.message for record in caplog.records] == logged
