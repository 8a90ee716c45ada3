"""Before any test module is imported: gRPC stays out of fork(), and no example is judged by its time.

At the end, how each memory limit was held.

The helper forks a child for each operation, and some tests do so within pytest, where gRPC is loaded too. Its fork
handlers would stop its threads in the parent and abort the child; neither is wanted by a child that never uses gRPC.

Hypothesis fails an example that takes 200 ms, and a test whose examples are slow to make: on a busy machine any does.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

from support import memory_limit

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := memory_limit.notes():
        terminalreporter.section("memory limits")
        for line in lines:
            terminalreporter.write_line(line)
