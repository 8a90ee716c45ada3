"""The memory limit of tests: it can fail, both with a cgroup and without."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.memory_limit import manifest_limit, memory_limit

MIB = 1 << 20
GREEDY = """
import sys
filled = bytearray(b"x") * (int(sys.argv[1]) << 20)
print(end="-", flush=True)
sys.stdin.read()
"""


def fill(limit_mib: int, use_mib: int, cgroups: Path) -> None:
    """Run a process that uses so much, in a limit, and check it while it does."""
    with memory_limit(limit_mib * MIB, cgroups) as limit:
        command = limit.wrapped([sys.executable, "-c", GREEDY, str(use_mib)])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdout.read(1)
            assert process.poll() is not None or limit.processes() == [process.pid] or limit.oom_kills()
            try:
                limit.check()
                assert limit.peak() > use_mib * MIB
                assert limit.use() > use_mib * MIB
            finally:
                process.stdin.close()


@pytest.mark.parametrize("cgroups", [Path("/sys/fs/cgroup"), Path("/nonexistent")], ids=["cgroup", "PSS"])
def test_a_process_below_the_limit_passes_and_one_above_it_fails(cgroups: Path) -> None:
    fill(96, 20, cgroups)
    with pytest.raises(AssertionError, match="the limit"):
        fill(40, 80, cgroups)


def test_the_limit_is_that_of_the_container_in_the_manifest() -> None:
    assert 0 < manifest_limit("helper") < manifest_limit("server")
    with pytest.raises(AssertionError, match="no memory limit for other"):
        manifest_limit("other")
