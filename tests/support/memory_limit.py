"""A memory limit for a command, as a container has: a cgroup that tells its peak use and its OOM kills.

    with memory_limit(manifest_limit("helper")) as limit:
        subprocess.run(limit.wrapped(["qat-helper", "audit", "verify", ...]), check=True)
        limit.check()

Several commands may run in one limit, one after another or at once. Where no cgroup can be made, `check` compares the
summed PSS of all their processes with the limit, and `note` tells the reason. PSS is sampled: a test whose peak lasts
calls `sample` then. With a cgroup, `sample` does nothing.
"""

import contextlib
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from support.conditions import wait_until

CGROUPS: Final = Path("/sys/fs/cgroup")
MANIFEST: Final = Path(__file__).parents[2] / "deployments/base/daemonset.yaml"
_TAG: Final = "QAT_TEST_MEMORY_LIMIT"
_INTERVAL: Final = 0.02
"""Seconds between samples of PSS."""

_notes: list[str] = []


def manifest_limit(container: str, manifest: Path = MANIFEST) -> int:
    """The memory limit of a container of the manifest, in bytes. The first `limits:` after its name is its own."""
    found = re.search(
        rf"- name: {container}\n +image:(?:.*\n)+? +limits:\n(?: +cpu: .*\n)? +memory: (\d+)Mi\n", manifest.read_text()
    )
    assert found is not None, f"{manifest} has no memory limit for {container}"
    return int(found[1]) << 20


def notes() -> list[str]:
    """How each limit was held and its peak, to be shown once at the end of the run."""
    return list(_notes)


class MemoryLimit:
    """Made by `memory_limit`. `reason`: why there is no cgroup; empty if there is one."""

    def __init__(self, limit: int, group: Path | None, reason: str = "") -> None:
        self.limit = limit
        self.reason = reason
        self._group = group
        self._tag = f"{_TAG}={os.getpid()}-{id(self)}"
        self._sampled = 0

    def wrapped(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` in the limit from its first instruction on, under the same process id."""
        if self._group is None:
            return ["/usr/bin/env", self._tag, *command]
        return ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', os.fspath(self._group / "cgroup.procs"), *command]

    def peak(self) -> int:
        """Bytes: the cgroup's peak use, page cache and kernel memory included; else the largest sum of PSS sampled."""
        if self._group is None:
            return self._sampled
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with contextlib.suppress(FileNotFoundError):
                return int((self._group / name).read_text())
        return self.use()  # cgroup v2 before Linux 5.19

    def use(self) -> int:
        """Bytes that processes and the kernel use now, without the page cache, which is reclaimed at the limit."""
        if self._group is None:
            return self.sample()
        statistics = _pairs(self._group / "memory.stat")
        for name in ("memory.current", "memory.usage_in_bytes"):
            with contextlib.suppress(FileNotFoundError):
                return int((self._group / name).read_text()) - statistics.get("cache", statistics.get("file", 0))
        raise AssertionError(f"{self._group} tells no use")

    def oom_kills(self) -> int:
        """Processes that the kernel has killed for the limit. Always 0 without a cgroup."""
        if self._group is None:
            return 0
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(FileNotFoundError):
                return _pairs(self._group / name)["oom_kill"]
        raise AssertionError(f"{self._group} tells no OOM kills")

    def sample(self) -> int:
        """Without a cgroup: take the sum of PSS now into the peak, and return it."""
        if self._group is not None:
            return 0
        now = sum(_pss(process) for process in self.processes())
        self._sampled = max(self._sampled, now)
        return now

    def processes(self) -> list[int]:
        """The pids of all processes in the limit."""
        if self._group is not None:
            return [int(line) for line in (self._group / "cgroup.procs").read_text().split()]
        wanted = self._tag.encode()
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and wanted in _read(entry / "environ").split(b"\0")
        ]

    def _killed(self) -> bool:
        """Kill all processes; whether none is left. One that is being killed takes a moment to leave."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return not self.processes()

    def check(self) -> None:
        """Raise AssertionError if the limit was exceeded."""
        self.sample()
        kills, peak = self.oom_kills(), self.peak()
        shown = f"{peak / 2**20:.1f} of {self.limit / 2**20:.0f} MiB"
        assert not kills, f"the kernel has killed {kills} processes at the limit: peak {shown}"
        assert self._group is not None or peak, "no process was measured"
        assert peak <= self.limit, f"over the limit: {shown} (summed PSS; no cgroup: {self.reason})"

    def note(self, what: str) -> None:
        """Show at the end of the run how the limit was held, and the peak."""
        how = "in a cgroup" if self._group is not None else f"by summed PSS, since {self.reason}"
        _notes.append(f"{what}: peak {self.peak() / 2**20:.1f} of {self.limit / 2**20:.0f} MiB, {how}")


@contextmanager
def memory_limit(limit: int, cgroups: Path = CGROUPS) -> Iterator[MemoryLimit]:
    """A limit of `limit` bytes, without swap. At its end, processes that are still in it are killed."""
    group, reason = _cgroup(limit, cgroups)
    limited = MemoryLimit(limit, group, reason)
    done = threading.Event()
    sampler = threading.Thread(target=_sample, args=(limited.sample, done), daemon=True)
    if group is None:
        sampler.start()
    try:
        yield limited
    finally:
        done.set()
        wait_until(limited._killed)
        if group is None:
            sampler.join()
        else:
            group.rmdir()


def _cgroup(limit: int, cgroups: Path) -> tuple[Path | None, str]:
    """A new cgroup with this limit, or the reason why there is none."""
    if (cgroups / "memory/memory.limit_in_bytes").exists():  # version 1
        parent, files = cgroups / "memory", ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        values = {files[0]: limit, files[1]: limit}
    elif (cgroups / "cgroup.controllers").exists():
        parent, values = cgroups, {"memory.max": limit, "memory.swap.max": 0}
        if "memory" not in _read(cgroups / "cgroup.subtree_control").decode().split():
            return None, f"{cgroups}/cgroup.subtree_control does not have memory"
    else:
        return None, f"{cgroups} has no memory controller"
    try:
        group = Path(tempfile.mkdtemp(prefix="qat-test-", dir=parent))
    except OSError as error:
        return None, f"no cgroup can be made in {parent}: {error.strerror}"
    try:
        for name, value in values.items():
            if (group / name).exists():  # the swap files are missing where swap is not counted
                (group / name).write_text(str(value))
    except OSError as error:
        group.rmdir()
        return None, f"{group} takes no limit: {error.strerror}"
    return group, ""


def _sample(sample: Callable[[], int], done: threading.Event) -> None:
    while not done.wait(_INTERVAL):
        sample()


def _pss(process: int) -> int:
    """Bytes of a process: its own pages, its share of shared ones, and its page tables. 0 if it has ended."""
    kibibytes = 0
    for line in _read(Path(f"/proc/{process}/smaps_rollup")).splitlines():
        name, _, rest = line.partition(b":")
        if name in (b"Pss_Anon", b"Pss_Shmem", b"SwapPss"):
            kibibytes += int(rest.split()[0])
    for line in _read(Path(f"/proc/{process}/status")).splitlines():
        if line.startswith(b"VmPTE:"):
            kibibytes += int(line.split()[1])
    return kibibytes << 10


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


def _pairs(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}
