"""What the examples' README says of running DPDK without QAT."""

import re
from typing import Final

from deployments.rendered import DEPLOYMENTS

_WORDS: Final = {"crypto": "crypto", "compress": "compression"}


def software_driver(kind: str) -> dict[str, str]:
    """The variables for one of the examples (crypto, compress), and their values."""
    text = (DEPLOYMENTS / "examples/README.md").read_text()
    found = re.search(rf"^\| {_WORDS[kind]} \| `(\S+)` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert found is not None
    return {"DEVICE_TYPE": found[1], "EAL_OPTIONS": found[2]}
