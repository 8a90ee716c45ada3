"""The commands of the README's section on installing, as they stand there."""

import re
from typing import Final

from kernel.machine import PROJECT

_SECTION: Final = "## Install on a cluster"


def install_commands() -> list[str]:
    """The lines of the section's first block."""
    text = (PROJECT / "README.md").read_text()
    block = re.search(r"^```\n(.*?)^```$", text[text.index(_SECTION) :], re.DOTALL | re.MULTILINE)
    assert block is not None, _SECTION
    return block[1].splitlines()
