"""The longest line of the audit log that each operation can cause: every field at its limit, escaped the worst way."""

import re
from enum import EnumMeta
from typing import Any, Final

import msgspec
from msgspec import inspect

from qat_helper.audit.log import Caller, Entry, printable
from qat_helper.errors import MESSAGE_LIMIT
from qat_helper.job import Job
from qat_helper.operations.table import OPERATIONS
from qat_shared.messages import (
    AnyReply,
    AnyRequest,
    AuditHead,
    Bound,
    Connected,
    Done,
    Failure,
    Provisioned,
    Registered,
)
from qat_shared.pci import PciAddress

_LETTERS: Final = ("x", '"', "\\", "\0", "\U0001d11e")
"""Letters that escaping lengthens by different factors, before and after the text is truncated."""
_ADDRESS: Final = PciAddress(0xFFFFFFFF, 0xFF, 0x1F, 7)
_CALLER: Final = Caller(pid=2**31 - 1, uid=2**32 - 2, gid=2**32 - 2)
_REPLIES: Final = (Bound, Connected, Done, Failure, Provisioned, Registered)
"""The replies to operations that are audited; Failure is also that to others."""
_LONGEST_IN_REPLY: Final = {"driver": 255, "before": 60, "now": 60, "message": MESSAGE_LIMIT, "rule": 64}
"""Characters: a file name (NAME_MAX), what provisioning reads of an attribute, errors.py, and a rule's name."""


_LONGEST_OF_PATTERN: Final = {"resource": f"{63 * 'x'}/{63 * 'x'}", "endpoint": f"{32 * 'x'}.sock"}
"""Texts that only a pattern limits (messages.py: Resource, SocketName)."""


def longest_lines() -> dict[str, int]:
    """The longest line, without its newline, in bytes, by operation."""
    return {operation.name: _longest(request) for request, operation in OPERATIONS.items()}


def longest_request() -> int:
    """The most bytes that one request adds to the log: its two lines with their newlines, of the worst operation."""
    audited = [kind for kind, operation in OPERATIONS.items() if operation.audited]
    return max(_length(_job(kind).entry("asked")) + _longest(kind) + 2 for kind in audited)


def _longest(kind: type[AnyRequest]) -> int:
    job = _job(kind)
    lines = [job.entry("refused", "unavailable", reply) for reply in _replies()]
    return max(_length(line) for line in [job.entry("asked"), *lines])


def _job(kind: type[AnyRequest]) -> Job:
    times = iter((0.0, 9_999_999.999))
    job = Job(_CALLER, _filled(kind, {}), lambda outcome: None, None, lambda: next(times, 9_999_999.999))
    job.asked = 2**63 - 1
    return job


def _length(entry: Entry) -> int:
    time = "2026-11-24T06:24:06.044Z"
    last = msgspec.structs.replace(entry, sequence=2**63 - 1, time=time, torn=True, previous="0" * 64)
    return len(msgspec.json.encode(last))


def _replies() -> list[AnyReply]:
    return [_filled(kind, _LONGEST_IN_REPLY) for kind in _REPLIES]


def _filled(kind: type[Any], limits: dict[str, int]) -> Any:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return kind(**{field.name: _value(field.type, field.name, limits) for field in info.fields})


def _value(kind: inspect.Type, name: str, limits: dict[str, int]) -> Any:
    """The longest value of a field. Fails for a text or number without a limit."""
    match kind:
        case inspect.StructType(cls=cls) if cls is PciAddress:
            return _ADDRESS
        case inspect.StructType(cls=cls) if cls is AuditHead:
            return AuditHead(sequence=0, hash="")  # not part of a line
        case inspect.EnumType(cls=cls):
            return _word(cls)
        case inspect.BoolType():
            return False
        case inspect.IntType(le=None):
            return -(2**31)
        case inspect.IntType(le=most):
            return most
        case inspect.VarTupleType(item_type=inspect.EnumType(cls=cls), max_length=int(number)):
            return (_word(cls),) * number
        case inspect.UnionType(types=types):
            return max(
                (_value(each, name, limits) for each in types if not isinstance(each, inspect.NoneType)), key=len
            )
        case inspect.StrType(pattern=str(pattern)) if name in _LONGEST_OF_PATTERN:
            text = _LONGEST_OF_PATTERN[name]
            assert re.search(pattern, text), name
            assert not re.search(pattern, f"x{text}"), name
            return text
        case inspect.BytesType():
            return b""  # not part of a line
        case inspect.StrType(max_length=most, pattern=pattern):
            number = limits[name] if most is None else most
            return max((letter * number for letter in _LETTERS if re.search(pattern or "", letter)), key=_escaped)
    raise AssertionError(f"{name}: what is the longest value of {kind}?")


def _word(cls: EnumMeta) -> Any:
    return max(cls, key=len)


def _escaped(text: str) -> int:
    return len(msgspec.json.encode(printable(text)))
