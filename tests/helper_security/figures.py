"""Counts of what the hostile clients tried, shown at the end of every run (conftest.py)."""

import os
from typing import Final

_FIGURES: Final[dict[str, int]] = {}


def tried(what: str, number: int = 1) -> None:
    """Add to a figure, such as "messages to the decoder"."""
    _FIGURES[what] = _FIGURES.get(what, 0) + number


def most(what: str, number: int) -> None:
    """Keep the largest value of a figure, such as "KiB of memory"."""
    _FIGURES[what] = max(_FIGURES.get(what, 0), number)


def wanted(variable: str, default: int) -> int:
    """The number of attempts: from an environment variable, or a default for daily runs."""
    return int(os.environ.get(variable, default))


def lines() -> list[str]:
    """One line per figure, sorted by name."""
    return [f"{number:>12,}  {what}" for what, number in sorted(_FIGURES.items())]
