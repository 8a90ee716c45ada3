"""The audit log as a person reads it: one row for each operation, from its first line and its last.

Pure: lines in, rows or text out. The serving helper never imports this.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec
from msgspec import Struct

from qat_helper.audit import Caller, Entry, Facts

INTERRUPTED: Final = "interrupted"
"""The helper ended before the operation did: the log does not say whether it came to pass."""
OPEN: Final = "under way"
"""There is no end yet, and the helper may still serve."""
_COLUMNS: Final = ("line", "time", "operation", "device", "uid", "pid", "verdict", "ms", "what")
_TEXT_LIMIT: Final = 100


class Row(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One operation, or a start, stop or refused connection (then `operation` is "")."""

    sequence: int
    end_sequence: int = 0
    time: str
    event: str
    operation: str = ""
    device: str = ""
    peer: Caller | None = None
    verdict: str = ""
    duration_ms: float | None = None
    arguments: Facts = {}
    reason: str = ""
    result: Facts = {}


class Filter(Struct, frozen=True, kw_only=True):
    """What is asked for; empty: anything. Times are compared with a row's first line, `until` is not included."""

    since: datetime | None = None
    until: datetime | None = None
    devices: frozenset[str] = frozenset()
    operations: frozenset[str] = frozenset()
    verdicts: frozenset[str] = frozenset()

    def takes(self, row: Row) -> bool:
        """Whether the row is wanted."""
        return (
            _in_time(row.time, self.since, self.until)
            and _among(row.device, self.devices)
            and _among(row.operation or row.event, self.operations)
            and _among(row.verdict, self.verdicts)
        )


def entries(lines: Iterable[bytes]) -> Iterator[Entry]:
    """The lines' entries; what a helper of another version or somebody else wrote may be none, and is left out."""
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=Entry)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue


def rows(found: Iterable[Entry]) -> list[Row]:
    """In the order in which they were asked for."""
    made: dict[int, Row] = {}
    unended: dict[int, Row] = {}
    for entry in found:
        if entry.event in ("start", "stop"):
            for sequence, row in unended.items():
                made[sequence] = msgspec.structs.replace(row, verdict=INTERRUPTED)
            if entry.event == "start":  # after a stop, none of these has an end any more either
                unended.clear()
        if entry.asked in made:
            made[entry.asked] = msgspec.structs.replace(
                made[entry.asked],
                end_sequence=entry.sequence,
                verdict=entry.verdict,
                duration_ms=entry.duration_ms,
                result=entry.result,
            )
            unended.pop(entry.asked, None)
            continue
        row = _row(entry)
        made[entry.sequence] = row
        if entry.event == "asked":
            unended[entry.sequence] = row
    return list(made.values())


def table(wanted: Sequence[Row]) -> str:
    """Plain text, a line for each row beneath the columns' names."""
    cells = [_COLUMNS, *map(_cells, wanted)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_COLUMNS))]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in cells)


def json_lines(wanted: Iterable[Row]) -> str:
    """One JSON object a line."""
    return "".join(msgspec.json.encode(row).decode() + "\n" for row in wanted)


def _row(entry: Entry) -> Row:
    return Row(
        sequence=entry.sequence,
        time=entry.time,
        event=entry.event,
        operation=entry.operation,
        device=str(entry.arguments.get("address", "")),
        peer=entry.peer,
        verdict=OPEN if entry.event == "asked" else entry.verdict,
        duration_ms=entry.duration_ms,
        arguments=entry.arguments,
        reason=entry.reason,
        result=entry.result,
    )


def _cells(row: Row) -> tuple[str, ...]:
    cells = (
        str(row.sequence),
        row.time,
        row.operation or f"({row.event})",
        row.device or "-",
        "-" if row.peer is None else str(row.peer.uid),
        "-" if row.peer is None else str(row.peer.pid),
        row.verdict or "-",
        "-" if row.duration_ms is None else f"{row.duration_ms:.1f}",
        _what(row),
    )
    # What the helper writes is plain; what somebody has put into the file need not be.
    return tuple("".join(letter if letter.isprintable() else "\ufffd" for letter in cell) for cell in cells)


def _what(row: Row) -> str:
    asked = _listed({name: value for name, value in row.arguments.items() if name != "address"})
    came = str(row.result.get("message", "")) or _listed(row.result)
    text = "; ".join(part for part in (asked, row.reason, came) if part)
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 1] + "…"


def _listed(facts: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in facts.items())


def _among(value: str, wanted: Collection[str]) -> bool:
    return not wanted or value in wanted


def _in_time(text: str, since: datetime | None, until: datetime | None) -> bool:
    if since is None and until is None:
        return True
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return True  # not a time that a helper wrote: rather shown than hidden
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    return (since is None or time >= since) and (until is None or time < until)
