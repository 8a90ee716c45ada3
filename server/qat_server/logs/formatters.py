"""The formats of log lines: klog's structured text, or JSON. An event is always one line, whatever its values contain.

    I1123 22:13:27.123456    1234 discovery.py:88] "VF bound" address="0000:6b:00.1" driver="vfio-pci"
    {"ts":"2026-11-23T22:13:27.123456Z","level":"info","v":0,"logger":"qat_server.devices.discovery","caller":"discovery.py:88",
     "msg":"VF bound","fields":{"address":"0000:6b:00.1","driver":"vfio-pci"}}

Text follows klog's serialize/keyvalues.go: strings as Go's %q, numbers as they are, lists as JSON. There is one
difference: a line feed in a value is escaped, so that no value can look like another log line. Only a traceback takes
several lines, each after a tab, in klog's key=<...> form.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import Final

import msgspec

from qat_server.logs.settings import severity_of, verbosity_of

_SEVERITY_LETTERS: Final = "IWEF"
_LEVELS: Final = ("info", "warning", "error", "fatal")
_MAX_DEPTH: Final = 8  # of nested values
_ESCAPES: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


def fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    """The fields given as `extra={"fields": {...}}`."""
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


def quote(text: str) -> str:
    """The text in double quotes as Go's strconv.Quote writes it: printable characters only."""
    if text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return '"' + "".join(_ESCAPES.get(letter) or _visible(letter) for letter in text) + '"'


def text_value(item: object) -> str:
    """A field's value as text; it never contains a line feed."""
    if isinstance(item, str):
        return quote(str(item))
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int | float):
        return str(item)
    if item is None:
        return "<nil>"
    if isinstance(item, list | tuple | set | frozenset | Mapping):
        return _json(item)
    return quote(str(item))


class TextFormatter(logging.Formatter):
    """klog's text lines. `directory`: show the source file's directory; `headers`: show the part before the message."""

    def __init__(self, *, headers: bool = True, directory: bool = False) -> None:
        super().__init__()
        self._headers = headers
        self._directory = directory

    def format(self, record: logging.LogRecord) -> str:
        """One line without its line feed; several lines only for a traceback."""
        parts = [quote(record.getMessage())]
        parts += [f"{_key(name)}={text_value(item)}" for name, item in fields_of(record).items()]
        for name, text in _traces(self, record):
            lines = (("".join(letter if letter == "\t" else _visible(letter) for letter in line)) for line in text)
            parts.append(f"{name}=<\n\t" + "\n\t".join(lines) + "\n >")
        line = " ".join(parts)
        return self._header(record) + line if self._headers else line

    def _header(self, record: logging.LogRecord) -> str:
        # Lmmdd hh:mm:ss.uuuuuu threadid file:line]  (klog's internal/buffer; its thread id is the process id too)
        stamp = time.strftime("%m%d %H:%M:%S", time.localtime(record.created))
        micros = int(record.created * 1_000_000) % 1_000_000
        letter = _SEVERITY_LETTERS[severity_of(record.levelno)]
        return f"{letter}{stamp}.{micros:06d} {record.process or 0:7d} {self._file(record)}:{record.lineno}] "

    def _file(self, record: logging.LogRecord) -> str:
        if not self._directory:
            return record.filename
        return os.path.join(os.path.basename(os.path.dirname(record.pathname)), record.filename)


class JsonFormatter(logging.Formatter):
    """One JSON object per line; times are in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """One line without its line feed."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {str(name): item for name, item in fields_of(record).items()}
        fields |= {name: "\n".join(text) for name, text in _traces(self, record)}
        return _json(
            {
                "ts": f"{stamp}.{int(record.created * 1_000_000) % 1_000_000:06d}Z",
                "level": _LEVELS[severity_of(record.levelno)],
                "v": verbosity_of(record.levelno),
                "logger": record.name,
                "caller": f"{record.filename}:{record.lineno}",
                "msg": record.getMessage(),
                "fields": fields,
            }
        )


def _traces(formatter: logging.Formatter, record: logging.LogRecord) -> list[tuple[str, list[str]]]:
    traces = []
    if record.exc_info and record.exc_info[0] is not None:
        traces.append(("traceback", formatter.formatException(record.exc_info).split("\n")))
    if record.stack_info:
        traces.append(("stack", record.stack_info.split("\n")))
    return traces


def _key(name: object) -> str:
    text = str(name)
    return text if text.isidentifier() else quote(text)


def _visible(letter: str) -> str:
    if letter.isprintable():
        return letter
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not UTF-8 (os.fsdecode)
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json(item: object) -> str:
    text = msgspec.json.encode(_plain(item)).decode()
    if text.isprintable():
        return text
    # JSON allows some characters to which terminals and line readers give a meaning (U+0085, U+2028, U+202E).
    return "".join(letter if letter.isprintable() else _json_escape(letter) for letter in text)


def _json_escape(letter: str) -> str:
    units = letter.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _plain(item: object, depth: int = 0) -> object:
    """The item with types that JSON has; any other type (a PciAddress, a Path, an exception) becomes text."""
    if item is None or isinstance(item, bool | int | float):
        return item
    if isinstance(item, Mapping) and depth < _MAX_DEPTH:
        return {_text(name): _plain(inner, depth + 1) for name, inner in item.items()}
    if isinstance(item, list | tuple | set | frozenset) and depth < _MAX_DEPTH:
        return [_plain(inner, depth + 1) for inner in item]
    return _text(item)


def _text(item: object) -> str:
    text = str(item)
    if text.isascii():
        return text
    # A lone surrogate (a byte that was not UTF-8) cannot be encoded.
    return "".join(_visible(letter) if 0xD800 <= ord(letter) <= 0xDFFF else letter for letter in text)
