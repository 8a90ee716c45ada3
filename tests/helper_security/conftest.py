"""A running helper to attack, and at the end of the run the counts of what was tried."""

from collections.abc import Iterator

import pytest

from helper_security import figures
from support.helper_process import Helper, helper


@pytest.fixture
def running() -> Iterator[Helper]:
    with helper() as running:
        yield running


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := figures.lines():
        terminalreporter.section("tried")
        for line in lines:
            terminalreporter.write_line(line)
