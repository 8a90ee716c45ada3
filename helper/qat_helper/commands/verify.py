"""Check that audit log files hold one unbroken chain, and find lines that were changed, removed, inserted or moved.

Pure: bytes in, findings out. audit/log.py describes the chain. The serving helper never imports this.

Each line is compared with what the lines before it imply. After a fault the comparison resumes from that line, so that
every fault is reported. A fragment of a failed write has no hash: the chain proves that it is there, not its contents.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from qat_helper.audit.log import digest
from qat_shared.messages import AuditHead

BEGINNING: Final = AuditHead(sequence=0, hash="0" * 64)
_RANGES_SHOWN: Final = 5


class Fault(NamedTuple):
    """A place that no helper could have written. `line`: its number in the file from 1, or 0 for the whole file."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


class Verdict(NamedTuple):
    """The result; no faults means intact. `head`: that of the last line; `lines`: the number in the chain."""

    faults: tuple[Fault, ...]
    head: AuditHead
    lines: int
    fragments: int


class Line(Struct, frozen=True):
    """One line of the chain and its position."""

    file: str
    number: int
    text: bytes
    sequence: int
    previous: str
    torn: bool
    hash: str

    @property
    def place(self) -> str:
        """The position, for a message about another line."""
        return f"{self.file}:{self.number}"


class _Link(Struct):
    sequence: int
    previous: str
    torn: bool = False


class Fragment(NamedTuple):
    """The fragment that a failed write left."""

    file: str
    number: int


class Invalid(NamedTuple):
    """Neither a line nor a fragment."""

    file: str
    number: int


Item = Line | Fragment | Invalid


def items(files: Mapping[str, bytes]) -> list[Item]:
    """The items of files (name: content), the files in the order of their first lines' sequence numbers."""
    parsed = [(name, list(_items(name, content))) for name, content in files.items()]
    return [item for _, found in sorted(parsed, key=lambda each: _first_sequence(each[1])) for item in found]


def verify(found: Sequence[Item], *, after: AuditHead = BEGINNING, head: AuditHead | None = None) -> Verdict:
    """Check the chain. `after`: the head before these files; `head`: a later known head that they must contain."""
    lines = [item for item in found if isinstance(item, Line)]
    faults = list(_faults(found, lines, after))
    last = AuditHead(sequence=lines[-1].sequence, hash=lines[-1].hash) if lines else after
    if head is not None:
        faults += _head_faults(lines, head, after)
    return Verdict(tuple(faults), last, len(lines), sum(isinstance(item, Fragment) for item in found))


def _items(name: str, content: bytes) -> Iterator[Item]:
    pieces = content.split(b"\n")
    for number, piece in enumerate(pieces, 1):
        if number == len(pieces):
            if piece:
                yield Fragment(name, number)  # without a newline, so not written completely
        elif piece.endswith(b"#torn"):
            yield Fragment(name, number)
        else:
            try:
                link = msgspec.json.decode(piece, type=_Link)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                yield Invalid(name, number)
            else:
                yield Line(name, number, piece, link.sequence, link.previous, link.torn, digest(piece))


def _first_sequence(found: Iterable[Item]) -> int:
    # The minimum of the first few, so that a changed first line does not move its file.
    return min([item.sequence for item in found if isinstance(item, Line)][:3], default=0)


def _faults(found: Sequence[Item], lines: Sequence[Line], after: AuditHead) -> Iterator[Fault]:
    index = _Index(lines)
    expected, before, fragment, invalid = after, None, False, False
    for item in found:
        if isinstance(item, Fragment):
            fragment = True
            continue
        if isinstance(item, Invalid):
            invalid = True
            yield Fault(item.file, item.number, "was changed or inserted: it is not a line of an audit log")
            continue
        number = expected.sequence + 1
        if (item.sequence, item.previous) != (number, expected.hash):
            # The invalid line is already reported; its missing sequence number is the same fault.
            if not (invalid and item.sequence == number + 1 and number not in index.places):
                yield Fault(item.file, item.number, index.diagnosis(item, expected, before))
        elif item.torn and not fragment:
            yield Fault(item.file, item.number, "the fragment of a failed write that it records before it was removed")
        elif fragment and not item.torn:
            yield Fault(
                item.file, item.number, "a fragment of a failed write that it does not record was inserted before it"
            )
        if item.previous == expected.hash:
            expected, before = AuditHead(sequence=number, hash=item.hash), item
        elif not (index.is_continued(expected) and (item.sequence < number or not index.is_linked(item))):
            expected, before = AuditHead(sequence=item.sequence, hash=item.hash), item
        fragment = invalid = False


class _Index:
    """All lines by sequence number and hash, to judge a line that is out of place."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.places: dict[int, list[Line]] = {}
        for line in lines:
            self.places.setdefault(line.sequence, []).append(line)
        self._heads = {(line.sequence, line.hash) for line in lines}
        self._continued = {(line.sequence - 1, line.previous) for line in lines}

    def is_continued(self, head: AuditHead) -> bool:
        """Whether a line continues that head."""
        return (head.sequence, head.hash) in self._continued

    def is_linked(self, line: Line) -> bool:
        """Whether the line continues another or is continued by another: then it was not inserted."""
        return (line.sequence, line.hash) in self._continued or (line.sequence - 1, line.previous) in self._heads

    def diagnosis(self, item: Line, expected: AuditHead, before: Line | None) -> str:
        """Explain why a line does not continue the one before it."""
        number = expected.sequence + 1
        if item.previous == expected.hash:
            return f"is number {item.sequence} and continues line {number - 1} of the chain: it was changed"
        if item.sequence != number and self.is_continued(expected) and not self.is_linked(item):
            return f"is number {item.sequence}, where line {number} of the chain belongs: it was inserted"
        if item.sequence > number:
            missing = [n for n in range(number, min(item.sequence, number + 100_000)) if n not in self.places]
            if not missing:
                return f"is line {item.sequence} of the chain, where line {number} belongs: lines were moved"
            if before is None and expected == BEGINNING:
                return f"{_ranges(missing)} of the chain, from its beginning, removed before it (or use --after)"
            return f"{_ranges(missing)} of the chain removed before it"
        if item.sequence < number:
            duplicates = [line for line in self.places[item.sequence] if line is not item]
            if not duplicates:
                return f"is line {item.sequence} of the chain, where line {number} belongs: it was moved"
            copied = any(line.hash == item.hash for line in duplicates)
            forged = item if copied or (item.sequence, item.hash) not in self._continued else duplicates[0]
            return f"line {item.sequence} of the chain is also at {duplicates[0].place}: {forged.place} was inserted"
        if before is None:
            return "does not continue the head before it: it was changed, or --after is wrong"
        if (item.sequence, item.hash) in self._continued:
            return f"does not hold the hash of {before.place}: that line was changed"
        return f"does not hold the hash of {before.place}: that line, or this one, was changed"


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first} to {last}" for first, last in runs[:_RANGES_SHOWN]]
    more = " and more" if len(runs) > _RANGES_SHOWN else ""
    return f"line{'s' if len(numbers) > 1 else ''} {', '.join(shown)}{more}"


def _head_faults(lines: Sequence[Line], head: AuditHead, after: AuditHead) -> Iterator[Fault]:
    candidates = [line for line in lines if line.sequence == head.sequence]
    if not candidates and head != after:
        last = max((line.sequence for line in lines), default=after.sequence)
        where = lines[-1] if lines else None
        yield Fault(
            where.file if where else "(no lines)",
            where.number if where else 0,
            f"the end was cut off: the chain ends with line {last}, the expected head is line {head.sequence}"
            if head.sequence > last
            else f"line {head.sequence} of the chain, the expected head, is missing",
        )
    elif candidates and not any(line.hash == head.hash for line in candidates):
        yield Fault(
            candidates[0].file,
            candidates[0].number,
            f"line {head.sequence} of the chain is not the expected head: it, or the chain up to it, was rewritten",
        )
