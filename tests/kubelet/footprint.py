"""What a process holds: its descriptors by kind, and its memory."""

import os
import re
from collections import Counter
from pathlib import Path

from msgspec import Struct


class Footprint(Struct, frozen=True):
    """`descriptors` by kind (socket, pipe, a path, ...); `memory` of its own (RssAnon) in bytes; `threads`."""

    descriptors: dict[str, int]
    memory: int
    threads: int


def footprint(pid: int) -> Footprint:
    """Of a process that is ours or, for root, anyone's."""
    kinds: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:  # closed meanwhile
            continue
        kinds[re.sub(r":\[\d+\]$", "", target)] += 1
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = {name: int(re.findall(rf"^{name}:\s*(\d+)", status, re.MULTILINE)[0]) for name in ("RssAnon", "Threads")}
    return Footprint(dict(kinds), numbers["RssAnon"] * 1024, numbers["Threads"])
