"""The commands that the project's pages give, as they stand there."""

import re
from pathlib import Path
from typing import Final

from kernel.machine import PROJECT

_README: Final = PROJECT / "README.md"
_INSTALL: Final = "## Install on a cluster"


def install_commands() -> list[str]:
    """The README's, to install on a cluster."""
    return _blocks(_README, _INSTALL)[0].splitlines()


def look_commands() -> list[str]:
    """The README's `doctor` and `status`."""
    return _blocks(_README, _INSTALL)[1].splitlines()


def profile_commands() -> str:
    """The deployments' README's, to put the profiles of the hardened overlay on a node."""
    return _blocks(PROJECT / "deployments/README.md", "**hardened** needs the profiles")[0]


def _blocks(page: Path, words: str) -> list[str]:
    """The blocks of commands that follow some words."""
    text = page.read_text()
    return re.findall(r"^```\n(.*?)^```$", text[text.index(words) :], re.DOTALL | re.MULTILINE)
