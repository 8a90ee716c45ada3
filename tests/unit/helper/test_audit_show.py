"""`audit show`: rows from a stream of lines, and a table in which no value can pass for another."""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from qat_helper.audit.log import Entry, Fields
from qat_helper.commands import show
from qat_helper.commands.chain import Items
from qat_helper.commands.run import run
from qat_helper.commands.show import INTERRUPTED, UNDER_WAY, Row, Rows, table_line
from qat_helper.operations.table import NAMES

CAPTURE = pytest.CaptureFixture[str]
RESULT: Fields = {"code": "kernel", "message": "the kernel refused", "errno": 16}
HOSTILE = {
    "long": "x" * 7_000,
    "a result of its own": 'fine" | result: "done',
    "columns of its own": "x  0000:6b:00.1  65532  812  ok",
    "separators": " | | || \\u007c",
    "spaces": "a" + " " * 300 + "b",
    "a line of its own": "x\n12  2026-01-01T08:00:00.000Z  BindDriver",
    "terminal escapes": "\x1b[2K\x1b[1A\x9b2J\r\b\x7f",
    "right to left": "\u202e\u2066 \u2028\u2029\x85",
    "quotes and backslashes": '\\" \\\\" \\',
    "wide and combining": "\uff5c\u0336\u200b\U0001d11e",
    "empty": "",
}


def line_of(entry: Entry) -> bytes:
    return msgspec.json.encode(entry) + b"\n"


def shown(tmp_path: Path, capfd: CAPTURE, entry: Entry, *options: str) -> str:
    """The log with this one line, as shown."""
    path = tmp_path / "audit.jsonl"
    path.write_bytes(line_of(entry))
    assert run(["audit", "show", *options, str(path)]) == 0
    return capfd.readouterr().out


def failed(**changes: object) -> Entry:
    """A failed operation's line: with `arguments`, a result and a reason."""
    entry = Entry(
        sequence=1,
        event="done",
        time="2026-01-01T08:00:00.000Z",
        operation="BindDriver",
        arguments={"address": "0000:6b:00.1", "driver": "vfio-pci"},
        verdict="failed",
        reason="why",
        result=RESULT,
        duration_ms=1.0,
        previous="0" * 64,
    )
    return msgspec.structs.replace(entry, **changes)


@pytest.mark.parametrize("reason", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_reason_is_quoted_and_comes_last(tmp_path: Path, capfd: CAPTURE, reason: str) -> None:
    output = shown(tmp_path, capfd, failed(reason=reason))
    (row,) = output.splitlines()[1:]
    assert output.isascii()
    assert output.replace("\n", "").isprintable()
    details = re.split(r" {2,}", row)[8]
    arguments, result, *last = details.split(" | ")
    assert (arguments, result) == ("driver=vfio-pci", 'result: "the kernel refused"')
    assert "|" not in "".join((arguments, result, *last))
    assert [json.loads(part.removeprefix("reason: ")) for part in last] == [reason] * bool(reason)


FIELDS = {
    "operation": lambda value: failed(operation=value),
    "time": lambda value: failed(time=value),
    "verdict": lambda value: failed(verdict=value),
    "event": lambda value: failed(event=value, operation=""),
    "address": lambda value: failed(arguments={"address": value}),
    "an argument": lambda value: failed(arguments={"driver": value}),
    "an argument's name": lambda value: failed(arguments={value: "vfio-pci"}),
    "the message": lambda value: failed(result={"message": value}),
    "a result": lambda value: failed(result={"now": value}),
    "a result's name": lambda value: failed(result={value: "x"}),
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_a_forged_line_contains_a_separator(tmp_path: Path, capfd: CAPTURE, field: str, value: str) -> None:
    """Each row has its nine columns, and its details have their parts, whatever a value holds."""
    output = shown(tmp_path, capfd, FIELDS[field](value))
    assert output.isascii()
    assert output.replace("\n", "").isprintable()
    plain = shown(tmp_path, capfd, FIELDS[field]("word" if value else ""))
    (row,), (expected,) = output.splitlines()[1:], plain.splitlines()[1:]
    columns, wanted = re.split(r" {2,}", row), re.split(r" {2,}", expected)
    assert len(columns) == len(wanted) == 9
    assert columns[8].count("|") == wanted[8].count("|")
    assert sum(a != b for a, b in zip(columns, wanted, strict=True)) <= 1, "no other column is changed"


def test_json_is_ascii_whatever_a_line_holds(tmp_path: Path, capfd: CAPTURE) -> None:
    for value in HOSTILE.values():
        output = shown(tmp_path, capfd, failed(reason=value, operation=value), "--json")
        assert output.isascii()
        assert output.count("\n") == 1
        assert json.loads(output).get("reason", "") == value


@pytest.mark.parametrize(
    ("option", "value", "listed"),
    [
        ("--operation", "Binddriver", ("BindDriver", "start", "refused")),
        ("--operation", "Reboot", ("SetNumVfs", "Hello")),
        ("--operation", "asked", ("BindDriver",)),
        ("--operation", "", ("BindDriver",)),
        ("--verdict", "fail", ("failed", "under way")),
        ("--verdict", "OK", ("'ok'",)),
        ("--device", "6b:00.1", ("is not a PCI address in lower case, such as 0000:6b:00.1",)),
        ("--device", "0000:6B:00.1", ("is not a PCI address",)),
    ],
)
def test_an_unknown_value_is_an_error_that_lists_the_known_ones(
    tmp_path: Path, capfd: CAPTURE, option: str, value: str, listed: Iterable[str]
) -> None:
    (tmp_path / "audit.jsonl").write_bytes(line_of(failed()))
    with pytest.raises(SystemExit, match="2"):
        run(["audit", "show", f"{option}={value}", str(tmp_path / "audit.jsonl")])
    error = capfd.readouterr().err
    assert f"argument {option}: " in error
    for word in listed:
        assert word in error


def test_every_known_operation_and_verdict_is_accepted(tmp_path: Path, capfd: CAPTURE) -> None:
    for operation in (*NAMES, "Hello", *show.EVENTS):
        shown(tmp_path, capfd, failed(), "--operation", operation)
    for verdict in show.VERDICTS:
        shown(tmp_path, capfd, failed(), "--verdict", verdict)


def log_of(entries: Iterable[Entry]) -> Items:
    numbered = (
        msgspec.structs.replace(entry, sequence=number, previous="0" * 64) for number, entry in enumerate(entries, 1)
    )
    content = b"".join(line_of(entry) for entry in numbered)
    return Items({"log": [content]})


def asked(operation: str = "BindDriver") -> Entry:
    return Entry(event="asked", operation=operation)


def done(sequence: int, verdict: str = "ok") -> Entry:
    return Entry(event="done", operation="BindDriver", asked=sequence, verdict=verdict)


START, STOP = Entry(event="start"), Entry(event="stop")


def summary(rows: Iterable[Row]) -> list[tuple[int, int, str]]:
    return [(row.sequence, row.end_sequence, row.verdict) for row in rows]


STREAMS = {
    "ends in another order": (
        [asked(), asked(), asked(), done(3), done(1, "failed"), done(2)],
        [(1, 5, "failed"), (2, 6, "ok"), (3, 4, "ok")],
    ),
    "one never ends": (
        [asked(), *(entry for n in range(2, 12, 2) for entry in (asked(), done(n)))],
        [(1, 0, UNDER_WAY), *((n, n + 1, "ok") for n in range(2, 12, 2))],
    ),
    "one ends last": (
        [asked(), asked(), done(2), asked(), done(4), done(1, "late")],
        [(1, 6, "late"), (2, 3, "ok"), (4, 5, "ok")],
    ),
    "the helper was killed": (
        [START, asked(), asked(), done(3), START, asked()],
        [(1, 0, ""), (2, 0, INTERRUPTED), (3, 4, "ok"), (5, 0, ""), (6, 0, UNDER_WAY)],
    ),
    "the helper stopped": ([asked(), STOP], [(1, 0, INTERRUPTED), (2, 0, "")]),
    "it ends after the stop": ([asked(), STOP, done(1)], [(1, 3, "ok"), (2, 0, "")]),
    "an end of before the start": (
        [asked(), START, done(1)],
        [(1, 0, INTERRUPTED), (2, 0, ""), (3, 0, "ok")],
    ),
    "an end twice": ([asked(), done(1), done(1, "failed")], [(1, 2, "ok"), (3, 0, "failed")]),
    "an end without its beginning": ([done(90), asked()], [(1, 0, "ok"), (2, 0, UNDER_WAY)]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("waiting", [0, 1500, 1 << 22], ids=["no room", "little room", "much room"])
@pytest.mark.parametrize(("entries", "expected"), STREAMS.values(), ids=STREAMS)
def test_rows_are_in_the_order_of_the_requests(
    entries: list[Entry], expected: list[tuple[int, int, str]], waiting: int
) -> None:
    assert summary(Rows(log_of(entries), waiting)) == expected


def test_how_much_may_wait_does_not_change_the_rows() -> None:
    dice = random.Random(16)  # noqa: S311  not a secret
    for _ in range(300):
        entries: list[Entry] = []
        under_way: list[int] = []
        for _ in range(dice.randrange(60)):
            if under_way and dice.random() < 0.5:
                entries.append(done(under_way.pop(dice.randrange(len(under_way)))))
            elif dice.random() < 0.05:
                entries.append(dice.choice((START, STOP)))
                under_way = under_way if entries[-1] is STOP else []
            else:
                entries.append(asked())
                under_way.append(len(entries))
        rows = [summary(Rows(log_of(entries), waiting)) for waiting in (0, 1000, 3000, 10_000, 1 << 22)]
        assert rows.count(rows[0]) == 5


def test_the_rows_before_one_under_way_do_not_wait_for_it() -> None:
    log = log_of([asked(), done(1), asked(), *(entry for n in range(4, 90, 2) for entry in (asked(), done(n)))])
    rows = Rows(log)
    first = next(iter(rows))
    assert (first.sequence, first.verdict) == (1, "ok")
    assert rows.unreadable == 0


def test_a_line_that_cannot_be_read_is_counted_once() -> None:
    entries = [asked(), done(1), asked(), asked()]
    content = b"".join(line_of(msgspec.structs.replace(e, sequence=n, previous="0")) for n, e in enumerate(entries, 1))
    content = content.replace(b'"BindDriver","verdict"', b'7,"verdict"', 1)
    content = content.replace(b'"sequence":3,"event":"asked"', b'"sequence":3,"event":9')
    rows = Rows(Items({"log": [content]}))
    assert [row.sequence for row in rows] == [1, 4]
    assert rows.unreadable == 2


def test_a_row_is_aligned_with_its_heading() -> None:
    row = Row(
        sequence=12, time="2026-01-01T08:00:00.000Z", event="asked", operation="PrepareSocketDirectory", verdict="ok"
    )
    heading, line = show.heading(), table_line(row)
    assert line.index("PrepareSocketDirectory") == heading.index("operation")
    assert line.index("ok") == heading.index("verdict")
    assert max(map(len, NAMES)) <= show._COLUMNS["operation"]
