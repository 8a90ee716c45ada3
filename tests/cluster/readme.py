"""The commands of the README's section on installing, as they stand there."""

import re
from typing import Final

from kernel.machine import PROJECT

_SECTION: Final = "## Install on a cluster"


def install_commands() -> list[str]:
    """The lines of the section's first block."""
    return _blocks()[0].splitlines()


def look_commands() -> list[str]:
    """Those of its second: `doctor` and `status`."""
    return _blocks()[1].splitlines()


def _blocks() -> list[str]:
    text = (PROJECT / "README.md").read_text()
    return re.findall(r"^```\n(.*?)^```$", text[text.index(_SECTION) :], re.DOTALL | re.MULTILINE)
