"""The audit log as an auditor reads it: every line continues the one before, and unfinished operations show."""

import hashlib
import json
from pathlib import Path
from typing import Any

ENDS = ("done", "late", "refused")


def verified(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, checked to form one chain. Fragments of failed writes are skipped (docs/audit.md)."""
    sequence, previous, torn, found = 0, "0" * 64, False, []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"#torn\n") or not line.endswith(b"\n"):
            torn = True
            continue
        entry = json.loads(line)
        link = (entry["sequence"], entry["previous"], entry.get("torn", False))
        assert link == (sequence + 1, previous, torn), f"line {entry['sequence']} does not continue the one before"
        sequence, previous, torn = sequence + 1, hashlib.sha256(line[:-1]).hexdigest(), False
        found.append(entry)
    return found


def interrupted(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The operations that began and have no last line."""
    ended = {line["asked"] for line in lines if line["event"] in ENDS and "asked" in line}
    return [line for line in lines if line["event"] == "asked" and line["sequence"] not in ended]
