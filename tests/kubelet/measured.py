"""Times that the tests measured: judged by what this machine does just now, and shown at the end of the run.

A bound holds for an idle machine. How busy it is shows in the time that a fixed piece of work takes, of the kind that
our processes do at their start: a Python process with the server's imports. It is done before and after what is
measured; when it takes five times as long as on an idle machine, the bound is five times as large.
"""

import asyncio
import subprocess
import sys
import time
import types
from statistics import median
from typing import Final, Self

from qat_server.kubelet.registration.directories import Registration

IDLE: Final = 0.2
"""Seconds that the fixed work takes on an idle machine of the kind that the bounds are for."""
MARGIN: Final = 1.8
"""Seconds above the bound, however busy the machine is: what waits seconds too long is to be seen, not milliseconds."""
LOOK: Final = 1.0
"""Seconds between two looks of the kubelet's plugin watcher, which a bound does not count."""
FRESH: Final = 2.0
"""Seconds for which the machine is taken to be as busy as it was."""
_WORK: Final = (sys.executable, "-c", "import qat_server.run_loop, qat_server.observability.metrics")

_TIMES: Final[dict[str, list[float]]] = {}
_busy: tuple[float, float] = (float("-inf"), 1.0)  # when that was seen, and the factor


class Timed:
    """Times of one thing, added one by one; at the end of the block they must be within the bound, in the median."""

    def __init__(self, what: str, bound: float, registration: Registration = Registration.KUBELET_SOCKET) -> None:
        self.what = f"{registration:15} {what}"
        self.bound = bound
        self.look = LOOK if registration is Registration.PLUGIN_WATCHER else 0.0
        self._before = 1.0
        self._judged: list[tuple[float, float, float]] = []  # by how much it was too long; the time; how busy it was

    async def __aenter__(self) -> Self:
        self._before = await busy()
        return self

    async def add(self, seconds: float) -> None:
        """Take note of a time that was measured just now."""
        _TIMES.setdefault(self.what, []).append(seconds)
        before, self._before = self._before, await busy()
        factor = max(before, self._before)
        self._judged.append((seconds - self.bound * factor, seconds, factor))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if kind is None:
            told = ", ".join(f"{seconds:.3f} s at {factor:.1f}" for _, seconds, factor in self._judged)
            assert median(excess for excess, _, _ in self._judged) < self.look + MARGIN, (
                f"{self.what}: {told}, where {self.bound:g} s times that are allowed, and {self.look + MARGIN:g} s"
            )


async def busy() -> float:
    """How many times as long as on an idle machine things take now; at least 1."""
    global _busy  # noqa: PLW0603 - it is the machine's, as what was measured is the run's
    if time.monotonic() > _busy[0] + FRESH:
        began = time.monotonic()
        work = await asyncio.create_subprocess_exec(*_WORK, stdin=subprocess.DEVNULL)
        assert await work.wait() == 0
        _busy = (time.monotonic(), max(1.0, (time.monotonic() - began) / IDLE))
    return _busy[1]


def lines() -> list[str]:
    """One for each thing measured, sorted by mode and name."""
    width = max(map(len, _TIMES), default=0)
    return [
        f"{what:{width}}  median {median(times) * 1000:7.0f} ms   most {max(times) * 1000:7.0f} ms   of {len(times)}"
        for what, times in sorted(_TIMES.items())
    ]
