"""Random edits of an audit log are detected. A test's examples share one log, which they only read."""

import json
from collections.abc import Callable, Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qat_helper.commands.chain import Items
from qat_helper.commands.verify import Fault, verify
from qat_shared.messages import AuditHead
from support.audit_logs import Lines, Written, check, forged, write

LOGS: dict[tuple[int, int, bool], Written] = {}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int, bool], Written]:
    def make(number: int, limit: int, torn: bool) -> Written:
        key = (number, limit, torn)
        if key not in LOGS:
            torn_at = frozenset(range(2, number, 3)) if torn else frozenset[int]()
            LOGS[key] = write(tmp_path_factory.mktemp("log"), number, limit, torn_at)
        return LOGS[key]

    return make


shapes = st.tuples(st.integers(2, 9), st.sampled_from((0, 500, 900)), st.booleans())
SETTINGS = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def is_rest(line: bytes) -> bool:
    return line.endswith(b"#torn")


def chain(files: Mapping[str, Lines]) -> Lines:
    """The meaningful content: the lines, and between which of them fragments are (not the fragments' contents)."""
    order = dict.fromkeys(item.file for item in Items({name: [b"\n".join((*files[name], b""))] for name in files}))
    found: Lines = []
    for line in (line for name in order for line in files[name]):
        if not is_rest(line):
            found.append(line)
        elif not found or found[-1] != b"rest":
            found.append(b"rest")
    return found[:-1] if found and found[-1] == b"rest" else found


def edit_of(draw: st.DataObject, files: dict[str, Lines], known: Lines) -> dict[str, Lines]:
    """One edit of one file, or of two. `known`: genuine lines."""
    files = {name: list(lines) for name, lines in files.items()}
    name = draw.draw(st.sampled_from(sorted(files)))
    lines = files[name]
    kind = draw.draw(st.sampled_from(("change", "delete", "move", "insert", "copy", "swap", "delete file", "join")))
    at = draw.draw(st.integers(0, max(0, len(lines) - 1)))
    if kind == "delete file":
        del files[name]
    elif not lines or (kind == "change" and not lines[at]):
        pass
    elif kind == "change":
        byte = draw.draw(st.integers(0, len(lines[at]) - 1))
        changed = bytearray(lines[at])
        changed[byte] = draw.draw(st.integers(0, 255).filter(lambda value: value not in (10, changed[byte])))
        lines[at] = bytes(changed)
    elif kind == "delete":
        del lines[at : at + draw.draw(st.integers(1, 3))]
    elif kind == "insert":
        lines.insert(at, draw.draw(st.sampled_from((b"", b"{}", b"x#torn", forged(known[0]), b"\xff"))))
    elif kind == "join":
        lines[at : at + 2] = [b"".join(lines[at : at + 2])]
    else:
        line = lines[at] if kind == "copy" else lines.pop(at)
        target = files[draw.draw(st.sampled_from(sorted(files)))]
        to = draw.draw(st.integers(0, len(target)))
        if kind == "swap" and to < len(target):
            line, target[to] = target[to], line
        (lines if kind == "swap" else target).insert(min(at, len(lines)) if kind == "swap" else to, line)
    return files


@SETTINGS
@given(shape=shapes, edits=st.integers(1, 3), draw=st.data())
def test_random_edits_are_found(
    written: Callable[[int, int, bool], Written], shape: tuple[int, int, bool], edits: int, draw: st.DataObject
) -> None:
    """With a head, all edits are found. Without one, all but cutting off the end and changing the last line."""
    log = written(*shape)
    files = log.files
    for _ in range(edits):
        if files and any(not is_rest(line) for lines in files.values() for line in lines):
            files = edit_of(draw, files, log.lines)
    before, after = chain(log.files), chain(files)
    same = before == after
    assert bool(check(files, head=log.head).faults) != same
    kept = [line for line in after if line != b"rest"]
    original = [line for line in before if line != b"rest"]
    # Without a head, a prefix of the chain plus at most one line that nothing protects is not a fault.
    if len(kept) > len(original) or original[: max(0, len(kept) - 1)] != kept[: max(0, len(kept) - 1)]:
        assert check(files).faults


@SETTINGS
@given(shape=shapes, draw=st.data())
def test_one_changed_line_is_named(
    written: Callable[[int, int, bool], Written], shape: tuple[int, int, bool], draw: st.DataObject
) -> None:
    log = written(*shape)
    places = [(name, at) for name, lines in log.files.items() for at, line in enumerate(lines) if not is_rest(line)]
    name, at = draw.draw(st.sampled_from(places))
    files = {each: list(lines) for each, lines in log.files.items()}
    line = files[name][at]
    byte = draw.draw(st.integers(0, len(line) - 1))
    value = draw.draw(st.integers(32, 126).filter(lambda value: value != line[byte]))
    files[name][at] = line[:byte] + bytes((value,)) + line[byte + 1 :]
    found = check(files, head=log.head).faults
    assert any(place(name, at + 1, fault) for fault in found), found


def place(name: str, line: int, fault: Fault) -> bool:
    return (fault.file, fault.line) == (name, line) or f"{name}:{line}" in fault.text


@SETTINGS
@given(shape=shapes, draw=st.data())
def test_removed_lines_are_named(
    written: Callable[[int, int, bool], Written], shape: tuple[int, int, bool], draw: st.DataObject
) -> None:
    log = written(*shape)
    first = draw.draw(st.integers(1, log.head.sequence))
    last = draw.draw(st.integers(first, log.head.sequence))
    files = {
        name: [line for line in lines if is_rest(line) or not first <= json.loads(line)["sequence"] <= last]
        for name, lines in log.files.items()
    }
    found = check(files, head=log.head).faults
    named = f"line {first} " if first == last else f"lines {first} to {last} "
    cut = f"the chain ends with line {first - 1}"
    assert any(named in fault.text or cut in fault.text for fault in found), found


@SETTINGS
@given(shape=shapes, draw=st.data())
def test_a_cut_at_any_byte_shows_against_a_head(
    written: Callable[[int, int, bool], Written], shape: tuple[int, int, bool], draw: st.DataObject
) -> None:
    log = written(*shape)
    contents = {name: b"".join(line + b"\n" for line in lines) for name, lines in log.files.items()}
    name = draw.draw(st.sampled_from([name for name, content in contents.items() if content]))
    kept = draw.draw(st.integers(0, len(contents[name]) - 1))
    contents[name] = contents[name][:kept]
    found = Items({name: [content] for name, content in contents.items()})
    assert verify(found, head=log.head).faults
    if name != list(contents)[-1]:
        assert verify(Items({name: [content] for name, content in contents.items()})).faults, (
            "only a cut at the end of the last file is undetectable"
        )


@given(content=st.binary(max_size=300))
def test_any_bytes_have_a_verdict(content: bytes) -> None:
    verify(Items({"log": [content]}), head=AuditHead(sequence=3, hash="0" * 64))
