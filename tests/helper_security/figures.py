"""What the hostile clients tried: shown at the end of the run, whether or not it passed (conftest.py)."""

import os
from typing import Final

_FIGURES: Final[dict[str, int]] = {}


def tried(what: str, number: int = 1) -> None:
    """Add to a figure, such as "messages to the decoder"."""
    _FIGURES[what] = _FIGURES.get(what, 0) + number


def most(what: str, number: int) -> None:
    """A figure of which the largest counts, such as "KiB of memory"."""
    _FIGURES[what] = max(_FIGURES.get(what, 0), number)


def wanted(variable: str, default: int) -> int:
    """How many to try: a variable of the environment, or what is enough for each day."""
    return int(os.environ.get(variable, default))


def lines() -> list[str]:
    """One for each figure, in the order of their names."""
    return [f"{number:>12,}  {what}" for what, number in sorted(_FIGURES.items())]
