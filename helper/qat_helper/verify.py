"""Whether audit log files hold one unbroken chain, and if not, which line was changed, removed, put in or moved.

Pure: bytes in, findings out. What the chain is: audit.py. The serving helper never imports this.

Each line is compared with what the lines before it let expect; after a fault the comparison goes on from there, so that
every place is told. What a failed write left ("rest") has no hash: that it is there is protected, what it says is not.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from qat_helper.audit import digest
from qat_shared.messages import AuditHead

BEGINNING: Final = AuditHead(sequence=0, hash="0" * 64)
_RANGES_SHOWN: Final = 5


class Fault(NamedTuple):
    """Something that no helper has written. `line`: its number in the file, from 1; 0: the whole file."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


class Verdict(NamedTuple):
    """What was found: no faults means intact. `head` is that of the last line, `lines` how many are in the chain."""

    faults: tuple[Fault, ...]
    head: AuditHead
    lines: int
    rests: int


class Line(Struct, frozen=True):
    """One line of the chain, and where it stands."""

    file: str
    number: int
    text: bytes
    sequence: int
    previous: str
    torn: bool
    hash: str

    @property
    def place(self) -> str:
        """For a sentence about another line."""
        return f"{self.file}:{self.number}"


class _Link(Struct):
    sequence: int
    previous: str
    torn: bool = False


class Rest(NamedTuple):
    """What a failed write left."""

    file: str
    number: int


class Garbage(NamedTuple):
    """Neither a line nor a rest."""

    file: str
    number: int


Item = Line | Rest | Garbage


def items(files: Mapping[str, bytes]) -> list[Item]:
    """All lines of files (name: content), the files in the order of their first lines' sequence numbers."""
    parsed = [(name, list(_items(name, content))) for name, content in files.items()]
    return [item for _, found in sorted(parsed, key=lambda each: _first_sequence(each[1])) for item in found]


def verify(found: Sequence[Item], *, after: AuditHead = BEGINNING, head: AuditHead | None = None) -> Verdict:
    """`after`: the head of what came before these files; `head`: one that was told later, which must be in them."""
    lines = [item for item in found if isinstance(item, Line)]
    faults = list(_faults(found, lines, after))
    last = AuditHead(sequence=lines[-1].sequence, hash=lines[-1].hash) if lines else after
    if head is not None:
        faults += _head_faults(lines, head, after)
    return Verdict(tuple(faults), last, len(lines), sum(isinstance(item, Rest) for item in found))


def _items(name: str, content: bytes) -> Iterator[Item]:
    pieces = content.split(b"\n")
    for number, piece in enumerate(pieces, 1):
        if number == len(pieces):
            if piece:
                yield Rest(name, number)  # without its newline, so not written whole
        elif piece.endswith(b"#torn"):
            yield Rest(name, number)
        else:
            try:
                link = msgspec.json.decode(piece, type=_Link)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                yield Garbage(name, number)
            else:
                yield Line(name, number, piece, link.sequence, link.previous, link.torn, digest(piece))


def _first_sequence(found: Iterable[Item]) -> int:
    # A changed first line must not put its file elsewhere: the smallest of the first few.
    return min([item.sequence for item in found if isinstance(item, Line)][:3], default=0)


def _faults(found: Sequence[Item], lines: Sequence[Line], after: AuditHead) -> Iterator[Fault]:
    chain = _Chain(lines)
    expected, before, rest, garbage = after, None, False, False
    for item in found:
        if isinstance(item, Rest):
            rest = True
            continue
        if isinstance(item, Garbage):
            garbage = True
            yield Fault(item.file, item.number, "was changed or put in: it is no line of an audit log")
            continue
        number = expected.sequence + 1
        if (item.sequence, item.previous) != (number, expected.hash):
            # A garbled line has its fault already: that it is missing here is the same fault.
            if not (garbage and item.sequence == number + 1 and number not in chain.places):
                yield Fault(item.file, item.number, chain.diagnosis(item, expected, before))
        elif item.torn and not rest:
            yield Fault(
                item.file, item.number, "the rest of a failed write, which it says stood before it, was removed"
            )
        elif rest and not item.torn:
            yield Fault(
                item.file, item.number, "a rest of a failed write, of which it says nothing, was put in before it"
            )
        if item.previous == expected.hash:
            expected, before = AuditHead(sequence=number, hash=item.hash), item
        elif not (chain.goes_on(expected) and (item.sequence < number or not chain.knows(item))):
            expected, before = AuditHead(sequence=item.sequence, hash=item.hash), item
        rest = garbage = False


class _Chain:
    """All lines there are, wherever they stand: what a line that is out of place is judged by."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.places: dict[int, list[Line]] = {}
        for line in lines:
            self.places.setdefault(line.sequence, []).append(line)
        self._heads = {(line.sequence, line.hash) for line in lines}
        self._continued = {(line.sequence - 1, line.previous) for line in lines}

    def goes_on(self, head: AuditHead) -> bool:
        """Whether some line continues that head."""
        return (head.sequence, head.hash) in self._continued

    def knows(self, line: Line) -> bool:
        """Whether it continues some line, or some line continues it: then it was not put in."""
        return (line.sequence, line.hash) in self._continued or (line.sequence - 1, line.previous) in self._heads

    def diagnosis(self, item: Line, expected: AuditHead, before: Line | None) -> str:
        """What is wrong with a line that does not continue what stands before it."""
        number = expected.sequence + 1
        if item.previous == expected.hash:
            return f"is number {item.sequence} and continues line {number - 1} of the chain: it was changed"
        if item.sequence != number and self.goes_on(expected) and not self.knows(item):
            return f"is number {item.sequence}, where line {number} of the chain belongs: it was put in"
        if item.sequence > number:
            missing = [n for n in range(number, min(item.sequence, number + 100_000)) if n not in self.places]
            if not missing:
                return f"is line {item.sequence} of the chain, where line {number} belongs: lines were moved"
            if before is None and expected == BEGINNING:
                return f"{_ranges(missing)} of the chain, from its beginning, removed before it: or give --after"
            return f"{_ranges(missing)} of the chain removed before it"
        if item.sequence < number:
            twins = [line for line in self.places[item.sequence] if line is not item]
            if not twins:
                return f"is line {item.sequence} of the chain, where line {number} belongs: it was moved"
            copied = any(line.hash == item.hash for line in twins)
            forged = item if copied or (item.sequence, item.hash) not in self._continued else twins[0]
            return f"line {item.sequence} of the chain stands here and at {twins[0].place}: {forged.place} was put in"
        if before is None:
            return "does not continue the head that came before it: it was changed, or that head is not its"
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
    there = [line for line in lines if line.sequence == head.sequence]
    if not there and head != after:
        last = max((line.sequence for line in lines), default=after.sequence)
        where = lines[-1] if lines else None
        yield Fault(
            where.file if where else "(no lines)",
            where.number if where else 0,
            f"the end was cut off: the chain ends with line {last}, the expected head is line {head.sequence}"
            if head.sequence > last
            else f"line {head.sequence} of the chain, the expected head, is not there",
        )
    elif there and not any(line.hash == head.hash for line in there):
        yield Fault(
            there[0].file,
            there[0].number,
            f"line {head.sequence} of the chain is not the expected head: it, or the chain up to it, was written anew",
        )
