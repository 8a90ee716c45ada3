"""Builds the harness before the first test, skips by name what needs root, and shows at the end what was measured."""

import pytest

from kubelet import harness_process, measured, production
from qat_server.kubelet.registration.directories import Registration


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    if why := harness_process.why_not():
        pytest.skip(why)
    harness_process.build()


@pytest.fixture(params=list(Registration))
def registration(request: pytest.FixtureRequest) -> Registration:
    """Both ways to register, one test for each."""
    return Registration(request.param)


@pytest.fixture
def as_in_production() -> None:
    """For tests of who may do what; the others run without root too, with all processes as one user."""
    if why := production.why_one_user():
        pytest.skip(why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := measured.lines():
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
