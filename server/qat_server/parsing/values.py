"""Parsers of single values: each takes a text, and raises ValueError with one phrase that names the valid form.

Durations follow Go's flag package, since users know these flags from a Go program. Booleans and whole numbers are in
qat_shared/values.py.
"""

import re
from ipaddress import IPv6Address
from typing import Final

from msgspec import Struct

from qat_server.logs.settings import SEVERITIES
from qat_shared.values import shown

_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER: Final = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_PART: Final = re.compile(rf"({_NUMBER})(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_DURATION: Final = re.compile(rf"(?:{_PART.pattern})+", re.ASCII)
_LONGEST_DURATION: Final = 24 * 3600.0
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)


class HostPort(Struct, frozen=True):
    """An address to listen on or to connect to. `host` has no brackets; "" is every address. Port 0: any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def duration(text: str, minimum: float, zero_is_off: bool = False) -> float:
    """Seconds: 5, 5s, 500ms, 1m30s (as time.ParseDuration; a plain number is seconds). `minimum` in seconds."""
    if re.fullmatch(_NUMBER, text, re.ASCII):
        seconds = float(text)
    elif _DURATION.fullmatch(text):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    else:
        raise ValueError(f"{shown(text)} is not a duration such as 5s, 500ms or 1m30s")
    if seconds == 0 and zero_is_off:
        return 0.0
    if seconds < minimum:
        off = ", or 0 for off" if zero_is_off else ""
        raise ValueError(f"{text} is too short, the minimum is {minimum:g}s{off}")
    if seconds > _LONGEST_DURATION:
        raise ValueError(f"{text[:40]} is too long, the maximum is 24h")
    return seconds


def host_port(text: str) -> HostPort | None:
    """127.0.0.1:9090, [::1]:9090, localhost:9090, :9090 (every address); None for "" (off). Resolves nothing."""
    if not text:
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or int(port) > 65535:
        raise ValueError(f"{shown(text)} is not an address such as 127.0.0.1:9090 (the port is 0 to 65535)")
    if host.startswith("[") and host.endswith("]"):
        try:
            return HostPort(str(IPv6Address(host[1:-1])), int(port))
        except ValueError:
            raise ValueError(f"{shown(host)} is not an IPv6 address") from None
    if ":" in host and "/" not in host:
        raise ValueError(f"{shown(text)}: an IPv6 address must be in brackets, as in [::1]:9090")
    if host and not _HOST.fullmatch(host):
        raise ValueError(f"{shown(host)} is not a host name or address")
    return HostPort(host, int(port))


def names(text: str, known: frozenset[str], kind: str) -> tuple[str, ...]:
    """A comma list of known names, each once, in the order given."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ValueError(f"no {kind} is named; known are {listed(known)}")
    unknown = [shown(name) for name in found if name not in known]
    if unknown:
        raise ValueError(f"unknown {kind} {', '.join(unknown)}; known are {listed(known)}")
    return found


def severity(text: str) -> int:
    """0 to 3, or INFO, WARNING, ERROR, FATAL in upper or lower case (as klog's -stderrthreshold)."""
    if text.upper() in SEVERITIES:
        return SEVERITIES.index(text.upper())
    if text in ("0", "1", "2", "3"):
        return int(text)
    raise ValueError(f"{shown(text)} is not INFO, WARNING, ERROR, FATAL or 0 to 3")


def vmodule(text: str) -> tuple[tuple[str, int], ...]:
    """Patterns with their levels: discovery=4,sim*=2. As in klog, patterns with level 0 are dropped."""
    patterns = []
    for part in text.split(","):
        if not part:
            continue  # a trailing comma
        pattern, equals, level = part.partition("=")
        if not pattern or not equals or not re.fullmatch(r"[0-9]{1,9}", level, re.ASCII):
            raise ValueError(f"{shown(part)} is not pattern=N, as in discovery=4,sim*=2")
        if int(level):
            patterns.append((pattern, int(level)))
    return tuple(patterns)


def listed(names: frozenset[str] | tuple[str, ...]) -> str:
    """Names joined for a sentence; a set is sorted, a tuple keeps its order."""
    return ", ".join(sorted(names) if isinstance(names, frozenset) else names)
