"""Edits of a log are detected: one example for each kind of edit."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from qat_helper.commands.chain import BEGINNING, Items
from qat_helper.commands.verify import Verdict, verify
from qat_shared.messages import AuditHead
from support.audit_logs import Lines, Written, check, edited, forged, write


def faults(lines: Lines, **heads: AuditHead) -> list[tuple[int, str]]:
    """The faults of a log in one file: line and text."""
    return [(fault.line, fault.text) for fault in check({"log": lines}, **heads).faults]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("six"), 6, 0)


EXAMPLES: dict[str, tuple[Callable[[Lines], Lines], list[tuple[int, str]]]] = {
    "nothing": (lambda six: six, []),
    "changed": (
        lambda six: [*six[:2], edited(six[2], operation="ReleaseDriver"), *six[3:]],
        [(4, "does not hold the hash of log:3: that line was changed")],
    ),
    "one byte changed": (
        lambda six: [*six[:2], six[2].replace(b"BindDriver", b"BindDriveR"), *six[3:]],
        [(4, "does not hold the hash of log:3: that line was changed")],
    ),
    "changed so that it is not a line": (
        lambda six: [*six[:2], six[2][:-1], *six[3:]],
        [(3, "was changed or inserted: it is not a line of an audit log")],
    ),
    "its hash of the line before changed": (
        lambda six: [*six[:2], edited(six[2], previous="0" * 64), *six[3:]],
        [
            (3, "does not hold the hash of log:2: that line, or this one, was changed"),
            (4, "does not hold the hash of log:3: that line was changed"),
        ],
    ),
    "its number changed": (
        lambda six: [*six[:2], edited(six[2], sequence=30), *six[3:]],
        [
            (3, "is number 30 and continues line 2 of the chain: it was changed"),
            (4, "does not hold the hash of log:3: that line was changed"),
        ],
    ),
    "the first changed": (
        lambda six: [edited(six[0], reason="other"), *six[1:]],
        [(2, "does not hold the hash of log:1: that line was changed")],
    ),
    "the last changed but one": (
        lambda six: [*six[:4], edited(six[4], reason="other"), six[5]],
        [(6, "does not hold the hash of log:5: that line, or this one, was changed")],
    ),
    "removed": (lambda six: six[:2] + six[3:], [(3, "line 3 of the chain removed before it")]),
    "several removed": (lambda six: six[:1] + six[4:], [(2, "lines 2 to 4 of the chain removed before it")]),
    "here and there removed": (
        lambda six: [six[0], six[2], six[5]],
        [(2, "line 2 of the chain removed before it"), (3, "lines 4 to 5 of the chain removed before it")],
    ),
    "the beginning removed": (
        lambda six: six[2:],
        [(1, "lines 1 to 2 of the chain, from its beginning, removed before it (or use --after)")],
    ),
    "put in": (
        lambda six: [*six[:3], forged(six[2], operation="ReleaseDriver"), *six[3:]],
        [(5, "line 4 of the chain is also at log:4: log:4 was inserted")],
    ),
    "put in again": (
        lambda six: [*six[:4], six[1], *six[4:]],
        [(5, "line 2 of the chain is also at log:2: log:5 was inserted")],
    ),
    "put in from another log": (
        lambda six: [*six[:3], edited(six[0], sequence=90, previous="12" * 32), *six[3:]],
        [(4, "is number 90, where line 4 of the chain belongs: it was inserted")],
    ),
    "put in, no line": (
        lambda six: [*six[:3], b"hello", *six[3:]],
        [(4, "was changed or inserted: it is not a line of an audit log")],
    ),
    "two swapped": (
        lambda six: [*six[:2], six[3], six[2], *six[4:]],
        [
            (3, "is line 4 of the chain, where line 3 belongs: lines were moved"),
            (4, "is line 3 of the chain, where line 5 belongs: it was moved"),
        ],
    ),
    "one moved back": (
        lambda six: [*six[:1], *six[2:5], six[1], six[5]],
        [
            (2, "is line 3 of the chain, where line 2 belongs: lines were moved"),
            (5, "is line 2 of the chain, where line 6 belongs: it was moved"),
        ],
    ),
    "a line break removed": (
        lambda six: [*six[:2], six[2] + six[3], *six[4:]],
        [
            (3, "was changed or inserted: it is not a line of an audit log"),
            (4, "lines 3 to 4 of the chain removed before it"),
        ],
    ),
    "made a rest": (
        lambda six: [*six[:2], six[2] + b"#torn", *six[3:]],
        [(4, "line 3 of the chain removed before it")],
    ),
    "a rest put in": (
        lambda six: [*six[:2], b"{#torn", *six[2:]],
        [(4, "a fragment of a failed write that it does not record was inserted before it")],
    ),
    "everything in reverse": (
        lambda six: six[::-1],
        [
            (1, "is line 6 of the chain, where line 1 belongs: lines were moved"),
            (2, "is line 5 of the chain, where line 7 belongs: it was moved"),
            *((n, f"is line {7 - n} of the chain, where line 6 belongs: it was moved") for n in range(3, 7)),
        ],
    ),
}


@pytest.mark.parametrize(("edit", "expected"), EXAMPLES.values(), ids=EXAMPLES)
def test_an_edit_is_found_and_located(
    six: Written, edit: Callable[[Lines], Lines], expected: list[tuple[int, str]]
) -> None:
    assert faults(edit(six.lines)) == expected


def test_an_intact_log(six: Written) -> None:
    assert check(six.files) == Verdict((), six.head, 6, 0)
    assert check({}) == Verdict((), BEGINNING, 0, 0)


CUT = "the end was cut off: the chain ends with line 4, the expected head is line 6"
OTHER = "line 6 of the chain is not the expected head: it, or the chain up to it, was rewritten"


def test_a_cut_off_end_shows_only_against_a_head(six: Written) -> None:
    assert faults(six.lines[:4]) == []
    assert faults(six.lines[:4], head=six.head) == [(4, CUT)]
    assert faults(six.lines, head=six.head) == []
    assert faults([], head=six.head) == [
        (0, "the end was cut off: the chain ends with line 0, the expected head is line 6")
    ]


def test_an_earlier_head_is_in_the_log(six: Written) -> None:
    third = AuditHead(sequence=3, hash=hashlib.sha256(six.lines[2]).hexdigest())
    assert faults(six.lines, head=third) == []
    assert faults(six.lines, head=BEGINNING) == []


def test_a_rewritten_log_shows_only_against_a_head(six: Written, tmp_path: Path) -> None:
    anew = [edited(six.lines[0], reason="another events")]
    for line in six.lines[1:]:
        anew.append(edited(line, previous=hashlib.sha256(anew[-1]).hexdigest()))
    assert faults(anew) == []
    assert faults(anew, head=six.head) == [(6, OTHER)]


def test_only_a_head_protects_the_last_line(six: Written) -> None:
    changed = [*six.lines[:5], edited(six.lines[5], operation="ReleaseDriver")]
    assert faults(changed) == []
    assert faults(changed, head=six.head) == [(6, OTHER)]


def test_a_log_without_its_older_files_continues_their_head(six: Written) -> None:
    second = AuditHead(sequence=2, hash=hashlib.sha256(six.lines[1]).hexdigest())
    assert faults(six.lines[2:], after=second, head=six.head) == []
    assert faults(six.lines[2:], after=second, head=second) == []
    assert faults(six.lines[3:], after=second) == [(1, "line 3 of the chain removed before it")]
    other = AuditHead(sequence=2, hash="12" * 32)
    assert faults(six.lines[2:], after=other) == [
        (1, "does not continue the head before it: it was changed, or --after is wrong")
    ]
    first = AuditHead(sequence=1, hash=hashlib.sha256(six.lines[0]).hexdigest())
    assert faults(six.lines[2:], after=second, head=first) == [
        (4, "line 1 of the chain, the expected head, is missing")
    ]


def test_files_are_taken_in_the_order_of_their_lines(tmp_path: Path) -> None:
    written = write(tmp_path, 12, 700)
    assert len(written.files) > 3
    backwards = dict(reversed(written.files.items()))
    assert check(backwards, head=written.head).faults == ()
    names = list(written.files)
    without = {name: lines for name, lines in written.files.items() if name != names[1]}
    (fault,) = check(without).faults
    assert (fault.file, fault.line) == (names[2], 1)
    assert fault.text.endswith("of the chain removed before it")
    assert str(fault).startswith(f"{names[2]}:1: ")
    without = {name: lines for name, lines in written.files.items() if name != names[-1]}
    assert [fault.text[:20] for fault in check(without, head=written.head).faults] == ["the end was cut off:"]


def test_a_torn_end_is_not_a_fault_but_its_later_removal_is(tmp_path: Path) -> None:
    written = write(tmp_path, 6, 0, torn=frozenset({3}))
    assert [line.endswith(b"#torn") for line in written.lines] == [False, False, False, True, False, False, False]
    verdict = check(written.files)
    assert (verdict.faults, verdict.fragments) == ((), 1)
    content = b"".join(line + b"\n" for line in written.lines) + b'{"sequ'
    verdict = verify(Items({"log": [content]}))
    assert (verdict.faults, verdict.fragments) == ((), 2)
    assert faults([line for line in written.lines if not line.endswith(b"#torn")]) == [
        (4, "the fragment of a failed write that it records before it was removed")
    ]
