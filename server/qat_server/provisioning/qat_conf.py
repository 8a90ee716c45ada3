"""`qat.conf`: one file of `Key=value` lines for all PFs of a node. Pure: text in, QatConf or ConfigurationError out.

    # a comment, also allowed after a value
    ServicesEnabled = sym;asym
    AutoresetEnabled = on

`ServicesEnabled` is sym, asym, dc, dcc, decomp, or several of them separated by `;`, in any order. The plan decides
whether a device supports them (plan.py). The names of services are resources.SERVICES, in the kernel's order.
"""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from qat_server.parsing.values import listed
from qat_shared.resources import SERVICES
from qat_shared.values import shown

FILE: Final = "qat.conf"

Services = tuple[str, ...]
"""Services in the kernel's order, each once. Equal tuples are the same configuration of a device."""

_SWITCH: Final = {"on": True, "off": False}


class ConfigurationError(Exception):
    """The provisioning configuration is invalid: one sentence that names the file, the line and the key.

    `line` is None where unknown, `key` is "" where no key is involved. In qat.toml the key is a path: rules[0].vfs.
    """

    def __init__(self, file: str, text: str, line: int | None = None, key: str = "") -> None:
        where = file if line is None else f"{file} line {line}"
        super().__init__(": ".join(part for part in (where, key, text) if part))
        self.file = file
        self.line = line
        self.key = key
        self.text = text


class QatConf(Struct, frozen=True):
    """The settings of a qat.conf; None for those it does not have. `services_line` is the line of the services."""

    services: Services | None = None
    auto_reset: bool | None = None
    services_line: int | None = None


def parse(text: str, file: str = FILE) -> QatConf:
    """Read a qat.conf; an empty one has no settings. Raises ConfigurationError."""
    services: Services | None = None
    auto_reset: bool | None = None
    lines: dict[str, int] = {}
    # Not splitlines(), which also splits at characters that editors do not treat as line ends.
    for number, raw in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            raise ConfigurationError(file, f"{shown(line)} is not of the form Key=value", number)
        if key in lines:
            raise ConfigurationError(file, f"is already set on line {lines[key]}; remove one of the two", number, key)
        try:
            if key == "ServicesEnabled":
                services = parse_services(value.split(";"))
            elif key == "AutoresetEnabled":
                auto_reset = _switch(value)
            else:
                raise ConfigurationError(
                    file, f"unknown key {shown(key)}; known are ServicesEnabled, AutoresetEnabled", number
                )
        except ValueError as error:
            raise ConfigurationError(file, str(error), number, key) from None
        lines[key] = number
    return QatConf(services, auto_reset, lines.get("ServicesEnabled"))


def parse_services(words: Sequence[str]) -> Services:
    """Services from their names, which may be in any order and have spaces around them. Raises ValueError."""
    names = [word.strip() for word in words]
    if not any(names):
        raise ValueError(f"no service is given; known are {listed(SERVICES)}")
    for name in names:
        if not name:
            raise ValueError("a service is missing before or after `;`")
        if name not in SERVICES:
            raise ValueError(f"unknown service {shown(name)}; known are {listed(SERVICES)}")
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice")
    return tuple(service for service in SERVICES if service in names)


def canonical(text: str | None) -> Services | None:
    """The services in qat/cfg_services as read from a device; None when the text is absent or not understood."""
    try:
        return parse_services((text or "").split(";"))
    except ValueError:
        return None


def _switch(value: str) -> bool:
    if value not in _SWITCH:
        raise ValueError(f"{shown(value)} is neither on nor off")
    return _SWITCH[value]
