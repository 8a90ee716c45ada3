"""Logging: klog's lines, JSON, verbosity. Nothing that is logged can look like another line."""

import json
import logging
import os
import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_server.logs import handler
from qat_server.logs.formatters import JsonFormatter, TextFormatter, quote, text_value
from qat_server.logs.settings import LogFormat, LogSettings, level_of, severity_of, verbosity_of
from qat_shared.pci import PciAddress
from support.log_lines import log, messages, say_everything

pytestmark = pytest.mark.usefixtures("logging_as_before")
ADDRESS = PciAddress(0, 0x6B, 0, 1)
HEADER = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ test_logs\.py:\d+\] ")


def record(message: str = "VF bound", level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("qat_server.devices.discovery", level, "/x/qat_server/discovery.py", 88, message, (), None)
    made.created = time.mktime((2026, 11, 23, 22, 13, 27, 0, 0, -1)) + 0.123456
    made.process = 1234
    made.fields = fields
    return made


def test_klog_line() -> None:
    line = TextFormatter().format(record(address=ADDRESS, driver="vfio-pci", count=3, busy=False))

    assert line == (
        'I1123 22:13:27.123456    1234 discovery.py:88] "VF bound" address="0000:6b:00.1" driver="vfio-pci" count=3'
        " busy=false"
    )


SEVERITIES = {
    "info": (20, "I"),
    "V(3)": (17, "I"),
    "debug": (10, "I"),
    "warning": (30, "W"),
    "error": (40, "E"),
    "critical": (50, "F"),
}


@pytest.mark.parametrize(("level", "letter"), SEVERITIES.values(), ids=SEVERITIES.keys())
def test_severity_letter(level: int, letter: str) -> None:
    assert TextFormatter().format(record(level=level))[0] == letter


def test_header_options() -> None:
    assert TextFormatter(headers=False).format(record()) == '"VF bound"'
    assert " qat_server/discovery.py:88] " in TextFormatter(directory=True).format(record())


VALUES: dict[str, tuple[object, str]] = {
    "string": ("x y", '"x y"'),
    "quotes": ('a"b\\c', r'"a\"b\\c"'),
    "line feed": ("a\nI0101 forged", r'"a\nI0101 forged"'),
    "carriage return, tab": ("a\r\tb", r'"a\r\tb"'),
    "escape": ("\x1b[31m", r'"\x1b[31m"'),
    "other line ends": ("\x85\u2028", r'"\u0085\u2028"'),
    "right to left": ("\u202e", r'"\u202e"'),
    "bytes that are no text": (os.fsdecode(b"\xff"), r'"\xff"'),
    "other scripts": ("gerät 設備", '"gerät 設備"'),
    "number": (7, "7"),
    "fraction": (0.5, "0.5"),
    "true": (True, "true"),
    "nothing": (None, "<nil>"),
    "address": (ADDRESS, '"0000:6b:00.1"'),
    "path": (Path("/a b"), '"/a b"'),
    "error": (ValueError("a\nb"), r'"a\nb"'),
    "list": ([ADDRESS, "x\n"], r'["0000:6b:00.1","x\n"]'),
    "tuple": ((1, None), "[1,null]"),
    "dict": ({"a": "\u2028"}, r'{"a":"\u2028"}'),
    "set of one": (frozenset({"a"}), '["a"]'),
}


@pytest.mark.parametrize(("item", "expected"), VALUES.values(), ids=VALUES.keys())
def test_text_value(item: object, expected: str) -> None:
    assert text_value(item) == expected


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3),
    max_leaves=6,
)


@given(st.text(st.characters(codec=None)), ANYTHING)
def test_a_record_is_one_printable_line(message: str, item: object) -> None:
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record(message, key=item))
        assert line.isprintable()
        line.encode()
    assert json.loads(line)["logger"] == "qat_server.devices.discovery"


@given(st.text())
def test_quoted_text_is_printable(text: str) -> None:
    assert quote(text).startswith('"')
    assert quote(text).isprintable()


def test_json_line() -> None:
    line = json.loads(JsonFormatter().format(record(level=17, address=ADDRESS, nodes=("a",), n=1)))

    assert re.fullmatch(r"2026-11-2\dT\d\d:13:27\.123456Z", line.pop("ts"))
    assert line == {
        "level": "info",
        "v": 3,
        "logger": "qat_server.devices.discovery",
        "caller": "discovery.py:88",
        "msg": "VF bound",
        "fields": {"address": "0000:6b:00.1", "nodes": ["a"], "n": 1},
    }


def test_traceback_stays_behind_tabs() -> None:
    made = record("reconcile failed", level=logging.ERROR)
    try:
        raise ValueError("bad\nI0101 00:00:00.000000 1 x.go:1] forged\r")
    except ValueError:
        made.exc_info = sys.exc_info()

    first, *rest = TextFormatter().format(made).split("\n")

    assert first.endswith('"reconcile failed" traceback=<')
    assert rest[-1] == " >"
    assert all(line.startswith("\t") for line in rest[:-1])
    assert "\r" not in "".join(rest)
    assert "forged" in json.loads(JsonFormatter().format(made))["fields"]["traceback"]


def test_levels() -> None:
    assert [level_of(v) for v in (-1, 0, 1, 4, 5, 6, 99)] == [20, 20, 19, 16, 10, 9, 1]
    assert [verbosity_of(level) for level in (40, 20, 19, 16, 10, 9)] == [0, 0, 1, 4, 5, 6]
    assert [severity_of(level) for level in (1, 20, 25, 30, 40, 50, 90)] == [0, 0, 0, 1, 2, 3, 3]


VERBOSITY = {
    "0": (LogSettings(), ["an error", "a warning", "an info"]),
    "1": (LogSettings(verbosity=1), ["an error", "a warning", "an info", "a detail"]),
    "4": (LogSettings(verbosity=4), ["an error", "a warning", "an info", "a detail", "more detail"]),
    "5": (LogSettings(verbosity=5), ["an error", "a warning", "an info", "a detail", "more detail", "a debug line"]),
    "module by name": (
        LogSettings(modules=(("log_lines", 4),)),
        ["an error", "a warning", "an info", "a detail", "more detail"],
    ),
    "module by glob": (LogSettings(modules=(("l[^b]*", 1),)), ["an error", "a warning", "an info", "a detail"]),
    "another module": (LogSettings(modules=(("discovery", 5), ("sim*", 5))), ["an error", "a warning", "an info"]),
    "the first pattern counts": (
        LogSettings(modules=(("lo*", 1), ("log_lines", 5))),
        ["an error", "a warning", "an info", "a detail"],
    ),
    "module never lowers": (
        LogSettings(verbosity=4, modules=(("log_lines", 1),)),
        ["an error", "a warning", "an info", "a detail", "more detail"],
    ),
}


@pytest.mark.parametrize(("settings", "expected"), VERBOSITY.values(), ids=VERBOSITY.keys())
def test_verbosity(settings: LogSettings, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    handler.configure(settings)
    say_everything()

    assert messages(capsys.readouterr().err) == expected


def test_the_logger_is_enabled_for_the_levels_that_are_written() -> None:
    handler.configure(LogSettings(verbosity=2))

    logger = logging.getLogger("qat_server.somewhere")
    assert [logger.isEnabledFor(level_of(verbosity)) for verbosity in (0, 2, 3)] == [True, True, False]


def test_line_names_its_caller(capsys: pytest.CaptureFixture[str]) -> None:
    handler.configure(LogSettings())
    log.info("here", n=1)
    logging.getLogger("qat_server.x").info("there %d", 2, extra={"fields": {"n": 1}})

    here, there = capsys.readouterr().err.splitlines()
    assert HEADER.match(here) and here.endswith('] "here" n=1')
    assert HEADER.match(there) and there.endswith('] "there 2" n=1')


def test_exception_carries_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    handler.configure(LogSettings(format=LogFormat.JSON))
    try:
        raise RuntimeError("why")
    except RuntimeError:
        log.exception("failed", n=1)

    line = json.loads(capsys.readouterr().err)
    assert "RuntimeError: why" in line["fields"]["traceback"]
    assert line["caller"].startswith("test_logs.py:")


def test_configuring_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    handler.configure(LogSettings())
    handler.configure(LogSettings(headers=False))
    log.info("once")

    assert capsys.readouterr().err == '"once"\n'


def test_flags_without_effect_are_logged_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    handler.configure(LogSettings(ineffective=("log_backtrace_at", "log_dir")))

    (line,) = capsys.readouterr().err.splitlines()
    assert '"flags accepted without effect" flags=["log_backtrace_at","log_dir"]' in line


def test_info_lines_of_libraries_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    handler.configure(LogSettings(verbosity=4))
    logging.getLogger("grpc").info("inner life")
    logging.getLogger("grpc").warning("trouble")

    assert messages(capsys.readouterr().err) == ["trouble"]


def test_a_field_that_cannot_be_formatted_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no")

    handler.configure(LogSettings())
    log.info("before", n=Broken())
    log.info("after")

    assert "after" in capsys.readouterr().err


def test_closed_stderr_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    handler.configure(LogSettings())
    monkeypatch.setattr(sys, "stderr", None)
    log.info("nobody reads")
