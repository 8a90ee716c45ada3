"""Check that audit log files hold one unbroken chain, and find lines that were changed, removed, inserted or moved.

Pure: items in, findings out. The serving helper never imports this.

Each run of lines is compared with what the lines before it imply. After a fault the comparison resumes from that run,
so that every fault is reported. The log is read once if it is intact, and twice if not: the second time looks for the
lines to which the runs' ends refer. A fragment of a failed write has no hash: the chain proves that it is there, not
its contents.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

from qat_helper.commands.chain import BEGINNING, MAX_PARTS, Item, Junk, Line, Place, Run, Survey, survey
from qat_shared.messages import AuditHead

_RANGES_SHOWN: Final = 5


class Fault(NamedTuple):
    """A place that no helper could have written. `line`: its number in the file from 1, or 0 for the whole file."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


class Verdict(NamedTuple):
    """The result; no faults means intact. `head`: that of the last line; `lines`: the number in the chain.

    `unfinished`: whether the log ends within a line, because its write failed or is under way.
    """

    faults: tuple[Fault, ...]
    head: AuditHead
    lines: int
    fragments: int
    unfinished: bool = False


def verify(found: Iterable[Item], *, after: AuditHead = BEGINNING, head: AuditHead | None = None) -> Verdict:
    """Check the chain. `after`: the head before these files; `head`: a later known head that they must contain.

    `found` is iterated twice if there is a fault.
    """
    log = survey(found, head)
    faults = list(_faults(found, log, after))
    last = AuditHead(sequence=log.last.sequence, hash=log.last.hash) if log.last else after
    if head is not None:
        faults += _head_faults(log, head, after)
    return Verdict(tuple(faults), last, log.lines, log.fragments, log.unfinished)


def _faults(found: Iterable[Item], log: Survey, after: AuditHead) -> Iterator[Fault]:
    index: _Index | None = None
    expected, before = after, None
    for part in log.parts:
        if isinstance(part, Junk):
            many = f", with the lines up to {part.file}:{part.last}: they are not lines" * (part.last > part.number)
            text = f"was changed or inserted{many or ': it is not a line'} of an audit log"
            yield Fault(part.file, part.number, text)
            continue
        number = expected.sequence + 1
        continues = part.previous == expected.hash
        if part.sequence != number or not continues:
            index = index or _Index(found, log.parts, after)
            # The invalid line is already reported; its missing sequence number is the same fault.
            if not (part.after_invalid and part.sequence == number + 1 and not index.has(number)):
                yield Fault(*part.place, index.diagnosis(part, expected, before))
        elif part.torn and not part.after_fragment:
            yield Fault(*part.place, "the fragment of a failed write that it records before it was removed")
        elif part.after_fragment and not part.torn:
            yield Fault(*part.place, "a fragment of a failed write that it does not record was inserted before it")
        if continues:
            length = part.head.sequence - part.sequence
            expected, before = AuditHead(sequence=number + length, hash=part.head.hash), part
        elif index is None or not index.is_out_of_place(part, expected):
            expected, before = part.head, part
    if not log.whole:
        text = f"only the first {MAX_PARTS:,} breaks were examined: lines that are called removed may be elsewhere"
        yield Fault("(more)", 0, text)


class _Index:
    """What a log holds, to judge a run that is out of place: by sequence number, and by hash where a run refers to it.

    The runs' ends are the only lines that can be out of place, so only they, and those next to them, are indexed.
    """

    def __init__(self, found: Iterable[Item], parts: Sequence[Run | Junk], after: AuditHead) -> None:
        runs = [part for part in parts if isinstance(part, Run)]
        self._spans = _merged((run.sequence, run.head.sequence) for run in runs)
        self._places: dict[int, list[Place]] = {run.sequence: [] for run in runs}
        wanted = {(after.sequence, after.hash)}
        for run in runs:
            wanted.update(
                ((run.sequence, run.hash), (run.head.sequence, run.head.hash), (run.sequence - 1, run.previous))
            )
        self._heads: Counter[tuple[int, str]] = Counter()
        self._continued = {(run.sequence - 1, run.previous) for run in runs}
        for line in (item for item in found if isinstance(item, Line)):
            head, before = (line.sequence, line.hash), (line.sequence - 1, line.previous)
            if head in wanted:
                self._heads[head] += 1
            if before in wanted:
                self._continued.add(before)
            places = self._places.get(line.sequence)
            if places is not None and len(places) < 2:
                places.append(line.place)

    def has(self, sequence: int) -> bool:
        """Whether a line has this sequence number."""
        return next(self._missing(sequence, sequence + 1), None) is None

    def is_out_of_place(self, run: Run, expected: AuditHead) -> bool:
        """Whether the chain goes on elsewhere, so that the lines after this run continue `expected`."""
        number = expected.sequence + 1
        return self._is_continued(expected) and (run.head.sequence < number or not self._is_linked(run))

    def diagnosis(self, run: Run, expected: AuditHead, before: Run | None) -> str:
        """Explain why a run does not continue the one before it."""
        number = expected.sequence + 1
        sequence = run.sequence
        if run.previous == expected.hash:
            follow = "" if run.single else f", and so were the lines up to {run.last_place}"
            return f"is number {sequence} and continues line {number - 1} of the chain: it was changed{follow}"
        if sequence != number and self._is_continued(expected) and not self._is_linked(run):
            return f"is number {sequence}, where line {number} of the chain belongs: it was inserted"
        if sequence > number:
            missing = _ranges(self._missing(number, sequence))
            if not missing:
                return f"is line {sequence} of the chain, where line {number} belongs: lines were moved"
            if before is None and expected == BEGINNING:
                return f"{missing} of the chain, from its beginning, removed before it (or use --after)"
            return f"{missing} of the chain removed before it"
        if sequence < number:
            follow = "" if run.single or run.head.sequence >= number else f", with the lines up to {run.last_place}"
            other = next((place for place in self._places[sequence] if place != run.place), None)
            if other is None:
                return f"is line {sequence} of the chain, where line {number} belongs: it was moved{follow}"
            head = (sequence, run.hash)
            if self._heads[head] > 1 or head not in self._continued:
                return f"line {sequence} of the chain is also at {other}: {run.place} was inserted{follow}"
            return f"line {sequence} of the chain is also at {other}: {other} was inserted"
        if before is None:
            return "does not continue the head before it: it was changed, or --after is wrong"
        if (sequence, run.hash) in self._continued:
            return f"does not hold the hash of {before.last_place}: that line was changed"
        return f"does not hold the hash of {before.last_place}: that line, or this one, was changed"

    def _is_continued(self, head: AuditHead) -> bool:
        return (head.sequence, head.hash) in self._continued

    def _is_linked(self, run: Run) -> bool:
        """Whether its first line continues another or is continued by another: then it was not inserted."""
        return (run.sequence, run.hash) in self._continued or (run.sequence - 1, run.previous) in self._heads

    def _missing(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges of sequence numbers from `start` to below `end` that no line has."""
        at = max(0, bisect_right(self._spans, (start, start)) - 1)
        while start < end:
            first, last = self._spans[at] if at < len(self._spans) else (end, end)
            if start < first:
                yield start, min(first, end) - 1
            start = max(start, last + 1)
            at += 1


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of numbers, sorted, those that touch or overlap joined."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return joined


def _ranges(missing: Iterator[tuple[int, int]]) -> str:
    """The first few ranges in words; "" for none."""
    found = list(islice(missing, _RANGES_SHOWN + 1))
    if not found:
        return ""
    shown = [str(first) if first == last else f"{first} to {last}" for first, last in found[:_RANGES_SHOWN]]
    more = " and more" if len(found) > _RANGES_SHOWN else ""
    plural = len(found) > 1 or found[0][0] != found[0][1]
    return f"line{'s' if plural else ''} {', '.join(shown)}{more}"


def _head_faults(log: Survey, head: AuditHead, after: AuditHead) -> Iterator[Fault]:
    if log.with_sequence is None and head != after:
        last = log.highest if log.lines else after.sequence
        yield Fault(
            log.last.file if log.last else "(no lines)",
            log.last.number if log.last else 0,
            f"the end was cut off: the chain ends with line {last}, the expected head is line {head.sequence}"
            if head.sequence > last
            else f"line {head.sequence} of the chain, the expected head, is missing",
        )
    elif log.with_sequence is not None and not log.has_head:
        yield Fault(
            *log.with_sequence,
            f"line {head.sequence} of the chain is not the expected head: it, or the chain up to it, was rewritten",
        )
