"""Times that the tests measured: shown at the end of the run, whether or not it passed (conftest.py)."""

from statistics import median
from typing import Final

_TIMES: Final[dict[str, list[float]]] = {}


def measured(what: str, seconds: float, most: float | None = None, registration: str = "kubelet-socket") -> float:
    """Note a time; `most` is a loose limit, since machines are shared."""
    what = f"{registration:15} {what}"
    _TIMES.setdefault(what, []).append(seconds)
    if most is not None:
        assert seconds < most, f"{what}: {seconds:.3f} s"
    return seconds


def lines() -> list[str]:
    """One for each thing measured, sorted by mode and name."""
    width = max(map(len, _TIMES), default=0)
    return [
        f"{what:{width}}  median {median(times) * 1000:7.0f} ms   most {max(times) * 1000:7.0f} ms   of {len(times)}"
        for what, times in sorted(_TIMES.items())
    ]
