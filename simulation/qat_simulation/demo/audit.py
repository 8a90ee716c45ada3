"""The demo's last step: it verifies the audit log's chain of hashes and shows one example of each operation."""

import hashlib
import json
from itertools import starmap
from typing import Any

from qat_server.command_line import tables
from qat_simulation.demo.demo_run import DemoRun
from qat_simulation.running_node import SimulationError

Record = dict[str, Any]


def show_audit(demo: DemoRun) -> None:
    """Verify the log and print examples. Raises SimulationError if a line does not continue the chain."""
    lines = demo.node.audit_log.read_bytes().splitlines()
    previous = None
    for number, line in enumerate(lines, 1):
        record = json.loads(line)
        if previous is not None and record["previous"] != previous:
            raise SimulationError(f"line {number} of {demo.node.audit_log} does not continue the line before")
        previous = hashlib.sha256(line).hexdigest()
    demo.success(f"audit log of the root process: {len(lines)} lines, the chain of hashes is intact")
    shown, more = examples([json.loads(line) for line in lines])
    columns = ("line", "event", "operation", "arguments", "verdict", "ms")
    tables.show(demo.console, "", columns, map(_row, shown))
    if more:
        demo.detail("not shown: " + ", ".join(starmap(_lines, more.items())))


def _lines(name: str, number: int) -> str:
    return f"{number} more line{'' if number == 1 else 's'} of {name}"


def _row(record: Record) -> tuple[str, ...]:
    return (
        str(record["sequence"]),
        record["event"],
        record.get("operation") or "(helper)",
        " ".join(map(str, (record.get("arguments") or {}).values())),
        record.get("verdict") or "-",
        f"{record['duration_ms']:.1f}" if record.get("duration_ms") is not None else "-",
    )


def examples(records: list[Record]) -> tuple[list[Record], dict[str, int]]:
    """For each operation the first `asked` record and the one that ended it, in the log's order; the number of others.

    `records` is the whole log. Records without an operation are the helper's own events.
    """
    ends = {record["asked"]: record for record in records if record.get("asked")}
    shown: list[Record] = []
    more: dict[str, int] = {}
    operations: set[str] = set()
    for record in records:
        operation = record.get("operation") or ""
        name = operation or f"the helper's {record['event']}"
        if name not in operations and not record.get("asked"):
            operations.add(name)
            shown.append(record)
            if record["sequence"] in ends:
                shown.append(ends[record["sequence"]])
        elif record not in shown:
            more[name] = more.get(name, 0) + 1
    return sorted(shown, key=lambda record: int(record["sequence"])), more
