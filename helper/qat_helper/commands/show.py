"""The audit log for people: one row per operation, from its first and last lines.

Pure: lines in, rows or text out. The serving helper never imports this.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec
from msgspec import Struct

from qat_helper.audit.log import Caller, Entry, Fields

INTERRUPTED: Final = "interrupted"
"""The helper ended before the operation did; the log does not say whether it took effect."""
UNDER_WAY: Final = "under way"
"""The operation has no last line yet, and the helper may still be running."""
_COLUMNS: Final = ("line", "time", "operation", "device", "uid", "pid", "verdict", "ms", "details")
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
    arguments: Fields = {}
    reason: str = ""
    result: Fields = {}


class Filter(Struct, frozen=True, kw_only=True):
    """Which rows to show; empty means any. Times are compared with a row's first line; `until` is exclusive."""

    since: datetime | None = None
    until: datetime | None = None
    devices: frozenset[str] = frozenset()
    operations: frozenset[str] = frozenset()
    verdicts: frozenset[str] = frozenset()

    def matches(self, row: Row) -> bool:
        """Whether the row passes the filter."""
        return (
            _in_range(row.time, self.since, self.until)
            and _among(row.device, self.devices)
            and _among(row.operation or row.event, self.operations)
            and _among(row.verdict, self.verdicts)
        )


def entries(lines: Iterable[bytes]) -> Iterator[Entry]:
    """The lines' entries. Lines that this version cannot decode, of another version or forged, are skipped."""
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=Entry)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue


def rows(found: Iterable[Entry]) -> list[Row]:
    """One row per operation, in the order of the requests."""
    by_sequence: dict[int, Row] = {}
    unfinished: dict[int, Row] = {}
    for entry in found:
        if entry.event in ("start", "stop"):
            for sequence, row in unfinished.items():
                by_sequence[sequence] = msgspec.structs.replace(row, verdict=INTERRUPTED)
            if entry.event == "start":  # no operation from before a start can still end
                unfinished.clear()
        if entry.asked in by_sequence:
            by_sequence[entry.asked] = msgspec.structs.replace(
                by_sequence[entry.asked],
                end_sequence=entry.sequence,
                verdict=entry.verdict,
                duration_ms=entry.duration_ms,
                result=entry.result,
            )
            unfinished.pop(entry.asked, None)
            continue
        row = _row(entry)
        by_sequence[entry.sequence] = row
        if entry.event == "asked":
            unfinished[entry.sequence] = row
    return list(by_sequence.values())


def table(wanted: Sequence[Row]) -> str:
    """Plain text: a line of column names, then one line per row."""
    cells = [_COLUMNS, *map(_cells, wanted)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_COLUMNS))]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in cells)


def json_lines(wanted: Iterable[Row]) -> str:
    """One JSON object per line."""
    return "".join(msgspec.json.encode(row).decode() + "\n" for row in wanted)


def _row(entry: Entry) -> Row:
    return Row(
        sequence=entry.sequence,
        time=entry.time,
        event=entry.event,
        operation=entry.operation,
        device=str(entry.arguments.get("address", "")),
        peer=entry.peer,
        verdict=UNDER_WAY if entry.event == "asked" else entry.verdict,
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
        _details(row),
    )
    # The helper writes printable text only; a forged line may hold anything.
    return tuple("".join(letter if letter.isprintable() else "\ufffd" for letter in cell) for cell in cells)


def _details(row: Row) -> str:
    asked = _listed({name: value for name, value in row.arguments.items() if name != "address"})
    came = str(row.result.get("message", "")) or _listed(row.result)
    text = "; ".join(part for part in (asked, row.reason, came) if part)
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 1] + "…"


def _listed(fields: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


def _among(value: str, wanted: Collection[str]) -> bool:
    return not wanted or value in wanted


def _in_range(text: str, since: datetime | None, until: datetime | None) -> bool:
    if since is None and until is None:
        return True
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return True  # not a time that a helper wrote: showing it is safer than hiding it
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    return (since is None or time >= since) and (until is None or time < until)
