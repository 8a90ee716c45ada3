"""From the bytes of log files to the lines of the chain, and to its runs. audit/log.py describes the chain.

Pure: bytes in, lines and runs out. It streams: a log of any size needs memory only for one chunk of bytes and for the
runs. A run is a longest series of lines that continue each other; an intact log is one run.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Annotated, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct

from qat_helper.audit.log import LINE_LIMIT, digest
from qat_shared.messages import AuditHead

BEGINNING: Final = AuditHead(sequence=0, hash="0" * 64)
MAX_PARTS: Final = 10_000
"""The runs and junk of one log that are kept: the limit bounds the memory that a log with breaks everywhere takes."""
_PIECE_LIMIT: Final = LINE_LIMIT + 64
"""The longest fragment: a line, and the marks with which later writes ended it."""
_TORN: Final = b"#torn"

_T = TypeVar("_T", bound=Struct)


class Place(NamedTuple):
    """A line's position: its number in the file from 1."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


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
    def place(self) -> Place:
        """Its position."""
        return Place(self.file, self.number)


class _Link(Struct):
    sequence: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    previous: Annotated[str, Meta(max_length=64)]
    torn: bool = False


class Fragment(NamedTuple):
    """The fragment that a failed write left. `ended`: by a later write; False: at the end of its file."""

    file: str
    number: int
    ended: bool


class Invalid(NamedTuple):
    """Neither a line nor a fragment."""

    file: str
    number: int


class Junk(NamedTuple):
    """Invalid lines of one file, one after another, up to number `last`."""

    file: str
    number: int
    last: int


class Run(NamedTuple):
    """Lines that continue each other, also from file to file.

    `hash` and `torn` are those of the first line. `after_fragment`, `after_invalid`: what is right before it.
    """

    place: Place
    sequence: int
    previous: str
    hash: str
    torn: bool
    after_fragment: bool
    after_invalid: bool
    last_place: Place
    head: AuditHead

    @property
    def single(self) -> bool:
        """Whether it is one line."""
        return self.head.sequence == self.sequence


Item = Line | Fragment | Invalid
Part = Run | Junk


class Items:
    """The items of files (name: chunks of bytes), the files in the order of their first lines' sequence numbers.

    Each iteration reads the files again.
    """

    def __init__(self, files: Mapping[str, Iterable[bytes]]) -> None:
        ordered = sorted(files, key=lambda name: _first_sequence(_items(name, files[name])))
        self._files = {name: files[name] for name in ordered}

    def __iter__(self) -> Iterator[Item]:
        for name, chunks in self._files.items():
            yield from _items(name, chunks)

    def lines(self) -> Iterator[Line]:
        """The lines alone."""
        return (item for item in self if isinstance(item, Line))


class Survey(Struct):
    """A log's runs and junk in order, and its numbers. `whole`: False if it has more than MAX_PARTS of them.

    `highest`: the highest sequence number. `with_sequence`: the first line with the sequence number of the wanted head.
    `has_head`: whether a line also has that head's hash. `unfinished`: whether the log ends within a line.
    """

    parts: list[Part] = []
    lines: int = 0
    fragments: int = 0
    last: Line | None = None
    highest: int = 0
    with_sequence: Place | None = None
    has_head: bool = False
    whole: bool = True
    unfinished: bool = False


def survey(found: Iterable[Item], head: AuditHead | None) -> Survey:
    """Read a log once. `head`: the wanted head."""
    log = Survey()
    first: Line | None = None  # of the present run; the last is log.last
    fragment = invalid = after_fragment = after_invalid = False

    def end_run() -> None:
        if first is not None and log.last is not None:
            _add(log, _run(first, log.last, after_fragment, after_invalid))

    for item in found:
        log.unfinished = False
        if isinstance(item, Line):
            last = log.last
            if (
                first is None
                or last is None
                or invalid
                or item.sequence != last.sequence + 1
                or item.previous != last.hash
                or item.torn != fragment
            ):
                end_run()
                first, after_fragment, after_invalid = item, fragment, invalid
            log.last = item
            log.lines += 1
            log.highest = max(log.highest, item.sequence)
            fragment = invalid = False
            if head is not None and item.sequence == head.sequence:
                log.with_sequence = log.with_sequence or item.place
                log.has_head = log.has_head or item.hash == head.hash
        elif isinstance(item, Fragment):
            log.fragments += 1
            log.unfinished = not item.ended
            fragment = True
        else:
            end_run()
            first, invalid = None, True
            _add_junk(log, item)
    end_run()
    return log


def _run(first: Line, last: Line, after_fragment: bool, after_invalid: bool) -> Run:
    return Run(
        place=first.place,
        sequence=first.sequence,
        previous=first.previous,
        hash=first.hash,
        torn=first.torn,
        after_fragment=after_fragment,
        after_invalid=after_invalid,
        last_place=last.place,
        head=AuditHead(sequence=last.sequence, hash=last.hash),
    )


def _add(log: Survey, part: Part) -> None:
    if len(log.parts) < MAX_PARTS:
        log.parts.append(part)
    else:
        log.whole = False


def _add_junk(log: Survey, item: Invalid) -> None:
    before = log.parts[-1] if log.parts else None
    if isinstance(before, Junk) and (before.file, before.last + 1) == (item.file, item.number):
        log.parts[-1] = before._replace(last=item.number)
    else:
        _add(log, Junk(item.file, item.number, item.number))


def decoded(line: bytes, kind: type[_T]) -> _T | None:
    """A line's JSON as this type; None if it is not that."""
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _items(name: str, chunks: Iterable[bytes]) -> Iterator[Item]:
    number = 1
    rest = b""
    for chunk in chunks:
        pieces = chunk.split(b"\n")
        pieces[0] = rest + pieces[0]
        rest = pieces.pop()[: _PIECE_LIMIT + 1]  # one byte more than allowed: too long, whatever follows
        for piece in pieces:
            yield _item(name, number, piece)
            number += 1
    if rest:  # without a newline, so not written completely
        yield Fragment(name, number, ended=False) if len(rest) <= _PIECE_LIMIT else Invalid(name, number)


def _item(name: str, number: int, piece: bytes) -> Item:
    if len(piece) > _PIECE_LIMIT:
        return Invalid(name, number)
    if piece.endswith(_TORN):
        return Fragment(name, number, ended=True)
    link = decoded(piece, _Link)
    if link is None:
        return Invalid(name, number)
    return Line(name, number, piece, link.sequence, link.previous, link.torn, digest(piece))


def _first_sequence(found: Iterable[Item]) -> int:
    # The minimum of the first few, so that a changed first line does not move its file.
    return min(islice((item.sequence for item in found if isinstance(item, Line)), 3), default=0)
