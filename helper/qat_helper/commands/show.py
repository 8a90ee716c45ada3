"""The audit log for people: one row per operation, from its first and last lines.

Pure: lines in, rows or text out. The serving helper never imports this.

It streams: rows are in the order of the requests, so only an operation that has not ended makes the rows after it wait,
up to a number of bytes.
"""

import json
import re
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec
from msgspec import Struct

from qat_helper.audit.log import Caller, Entry, Fields
from qat_helper.commands.chain import Items, Line, decoded

INTERRUPTED: Final = "interrupted"
"""The helper ended before the operation did; the log does not say whether it took effect."""
UNDER_WAY: Final = "under way"
"""The operation has no last line yet, and the helper may still be running."""
VERDICTS: Final = ("ok", "failed", "denied", "busy", "late", INTERRUPTED, UNDER_WAY)
"""All verdicts of rows."""
EVENTS: Final = ("start", "stop", "refused")
"""The events of rows that are not operations; `refused`: a connection."""
_COLUMNS: Final = {
    "line": 7,
    "time": 24,
    "operation": 22,
    "device": 12,
    "uid": 5,
    "pid": 7,
    "verdict": 11,
    "ms": 8,
    "details": 0,
}
"""The table's columns and their widths. A longer cell shifts the rest of its row, and is not truncated."""
_WORD: Final = re.compile(r"[A-Za-z0-9_.:;,/+-]+", re.ASCII)
"""A value that is shown as it is. Any other is quoted, since a forged line may hold anything."""
_ESCAPED: Final = re.compile(r"\||\x7f|(?<= ) ")
"""In a quoted value: two spaces separate the columns, and | separates the details."""
_WAITING: Final = 4 * 1024 * 1024
"""Bytes of lines that wait for an operation before them to end."""
_OVERHEAD: Final = 400
"""Bytes that a waiting line takes besides its text."""
_LATE: Final = 4 * 1024 * 1024
"""Bytes of last lines that are kept from the first reading. A helper has far fewer operations under way."""
_OPEN: Final = 20_000
"""Operations whose ends the first reading looks for at once; a helper has far fewer under way."""
_LIFE: Final = ("start", "stop")


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


class _Outline(Struct):
    """What pairs the lines of an operation."""

    event: str = ""
    asked: int = 0


class _Waiting(Struct):
    """A row's lines. `number`: that of its first line, from 1. `open`: its last line may still come."""

    sequence: int
    number: int
    first: bytes
    weight: int
    open: bool
    end: bytes = b""


class Rows:
    """The rows of a log in the order of the requests. The log is read twice.

    The first reading keeps the last lines of operations that end too late for the rows after them to wait. Lines that
    this version cannot decode (another version's, or forged) are skipped; `unreadable` counts them.
    """

    def __init__(self, log: Items, waiting: int = _WAITING) -> None:
        self.unreadable = 0
        self._log = log
        self._limit = waiting
        self._late: dict[int, bytes] = {}
        self._late_shown: set[int] = set()
        self._helper_ended = 0  # the number of the last line about a start or stop
        self._queue: deque[_Waiting] = deque()
        self._open: dict[int, _Waiting] = {}

    def __iter__(self) -> Iterator[Row]:
        self._find_late()
        size = 0
        for number, line in enumerate(self._log.lines(), 1):
            outline = decoded(line.text, _Outline)
            if outline is None:
                self.unreadable += 1
            elif outline.asked in self._late_shown:
                self._late_shown.discard(outline.asked)
            else:
                size += _weight(line)
                self._take(number, line, outline)
            while self._queue and (size > self._limit or not self._queue[0].open):
                waiting = self._queue.popleft()
                size -= waiting.weight
                yield from self._row(waiting)
        for waiting in self._queue:
            yield from self._row(waiting)

    def _find_late(self) -> None:
        began: OrderedDict[int, int] = OrderedDict()
        at, room = 0, _LATE
        for number, line in enumerate(self._log.lines(), 1):
            outline = decoded(line.text, _Outline)
            if outline is None:
                continue
            if outline.event in _LIFE:
                self._helper_ended = number
                if outline.event == "start":
                    began.clear()
            before, at = at, at + _weight(line)
            start = began.pop(outline.asked, None)
            if start is not None:
                if at - start > self._limit and room > 0:
                    self._late[outline.asked] = line.text
                    room -= _weight(line)
            elif outline.event == "asked":
                began[line.sequence] = before
                if len(began) > _OPEN:
                    began.popitem(last=False)

    def _take(self, number: int, line: Line, outline: _Outline) -> None:
        if outline.event == "start":  # no operation from before a start can still end
            for waiting in self._open.values():
                waiting.open = False
            self._open.clear()
        if (ended := self._open.pop(outline.asked, None)) is not None:
            ended.end, ended.open = line.text, False
            ended.weight += _weight(line)
            return
        waiting = _Waiting(line.sequence, number, line.text, _weight(line), outline.event == "asked")
        self._queue.append(waiting)
        if waiting.open:
            if line.sequence in self._open:  # forged: the number is taken
                self._open[line.sequence].open = False
            self._open[line.sequence] = waiting

    def _row(self, waiting: _Waiting) -> Iterator[Row]:
        if waiting.open:
            self._open.pop(waiting.sequence, None)
            waiting.end = self._late.pop(waiting.sequence, b"")
            if waiting.end:
                self._late_shown.add(waiting.sequence)
        first = decoded(waiting.first, Entry)
        end = decoded(waiting.end, Entry) if waiting.end else None
        self.unreadable += (first is None) + (end is None and waiting.end != b"")
        if first is None:
            return
        last = end or first
        unknown = INTERRUPTED if waiting.number < self._helper_ended else UNDER_WAY
        yield Row(
            sequence=first.sequence,
            end_sequence=end.sequence if end else 0,
            time=first.time,
            event=first.event,
            operation=first.operation,
            device=str(first.arguments.get("address", "")),
            peer=first.peer,
            verdict=unknown if last.event == "asked" else last.verdict,
            duration_ms=last.duration_ms,
            arguments=first.arguments,
            reason=first.reason,
            result=last.result,
        )


def _weight(line: Line) -> int:
    return len(line.text) + _OVERHEAD


def heading() -> str:
    """The table's line of column names."""
    return _aligned(_COLUMNS)


def table_line(row: Row) -> str:
    """The row as a line of the table. Two spaces separate the columns; a value has at most one in a row."""
    return _aligned(
        (
            str(row.sequence),
            _word(row.time),
            _word(row.operation) if row.operation else f"({_word(row.event)})",
            _word(row.device) if row.device else "-",
            "-" if row.peer is None else str(row.peer.uid),
            "-" if row.peer is None else str(row.peer.pid),
            UNDER_WAY if row.verdict == UNDER_WAY else _word(row.verdict) if row.verdict else "-",
            "-" if row.duration_ms is None else f"{row.duration_ms:.1f}",
            _details(row),
        )
    )


def json_line(row: Row) -> str:
    """The row as a JSON object in ASCII, with a newline."""
    return json.dumps(msgspec.to_builtins(row), separators=(",", ":")) + "\n"


def _aligned(cells: Iterable[str]) -> str:
    return "  ".join(map(str.ljust, cells, _COLUMNS.values())).rstrip() + "\n"


def _details(row: Row) -> str:
    """The arguments, the result, and last the reason, which the client chose. No value contains the separator."""
    message = row.result.get("message")
    result = _word(str(message)) if message else _listed(row.result)
    parts = (
        _listed({name: value for name, value in row.arguments.items() if name != "address"}),
        result and f"result: {result}",
        row.reason and f"reason: {_quoted(row.reason)}",
    )
    return " | ".join(part for part in parts if part)


def _listed(fields: Mapping[str, object]) -> str:
    return " ".join(f"{_word(name)}={_word(str(value))}" for name, value in fields.items())


def _word(value: str) -> str:
    return value if _WORD.fullmatch(value) else _quoted(value)


def _quoted(value: str) -> str:
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value))


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
