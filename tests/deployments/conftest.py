"""Has kustomize ready before the first test, and shows at the end what was measured."""

import shutil
import subprocess

import pytest

from deployments import measured, rendered


@pytest.fixture(scope="session")
def kustomize() -> None:
    """For whatever renders manifests."""
    if shutil.which("go") is None and not rendered.KUSTOMIZE.exists():
        pytest.skip("Go is needed to compile kustomize")
    subprocess.run([rendered.ROOT / "tests/deployments/tools/build"], check=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := measured.lines():
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
