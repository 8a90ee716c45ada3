"""Audit logs for tests to edit and verify."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from qat_helper.audit.log import AuditLog, Entry
from qat_helper.commands.chain import Items
from qat_helper.commands.verify import Verdict, verify
from qat_shared.messages import AuditHead

Lines = list[bytes]


class Written(NamedTuple):
    """A genuine log: its lines, and the lines of each file."""

    lines: Lines
    files: dict[str, Lines]
    head: AuditHead


def write(directory: Path, number: int, limit: int, torn: frozenset[int] = frozenset()) -> Written:
    """Write `number` lines; after those in `torn`, a write fails part way."""
    path = directory / "audit.jsonl"
    for index in range(number):
        with closing(AuditLog(path, limit=limit)) as log:
            log.append(Entry(event="asked", operation="BindDriver", reason="x" * (index % 7)))
        if index + 1 in torn:
            with path.open("ab") as file:
                file.write(b'{"sequence":' + b"9" * index)
    with closing(AuditLog(path, limit=limit)) as log:
        head = log.head
    paths = [*sorted(directory.glob("audit.jsonl.*")), path]
    files = {each.name: each.read_bytes().splitlines() for each in paths}
    return Written([line for lines in files.values() for line in lines], files, head)


def check(files: Mapping[str, Lines], **heads: AuditHead) -> Verdict:
    return verify(Items({name: [line + b"\n" for line in lines] for name, lines in files.items()}), **heads)


def edited(line: bytes, **changes: Any) -> bytes:
    return json.dumps(json.loads(line) | changes, separators=(",", ":")).encode()


def forged(after: bytes, **changes: Any) -> bytes:
    """A forged line that continues `after` correctly."""
    sequence = json.loads(after)["sequence"] + 1
    return edited(after, sequence=sequence, previous=hashlib.sha256(after).hexdigest(), **changes)
