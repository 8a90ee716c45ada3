"""`qat.conf`: one file of `Key=value` lines for all PFs of a node. Pure: text in, QatConf or ConfigurationError out.

    # comments, also after a value
    ServicesEnabled = sym;asym
    AutoresetEnabled = on

`ServicesEnabled` is sym, asym, dc, dcc, decomp or several of them with `;` between, in any order. Whether a device can
take them is not decided here (plan.py). The names of services are naming.SERVICES, in the kernel's order.
"""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from qat_server.devices.naming import SERVICES
from qat_server.parsing.values import listed, shown

FILE: Final = "qat.conf"

Services = tuple[str, ...]
"""Services in the kernel's order, each once: two that are equal are the same configuration of a device."""

_SWITCH: Final = {"on": True, "off": False}


class ConfigurationError(Exception):
    """The provisioning configuration makes no sense: one sentence that names the file, the line and the key.

    `line` is None where it is not known, `key` empty where it is about no key. In qat.toml it is a path: rules[0].vfs.
    """

    def __init__(self, file: str, text: str, line: int | None = None, key: str = "") -> None:
        where = file if line is None else f"{file} line {line}"
        super().__init__(": ".join(part for part in (where, key, text) if part))
        self.file = file
        self.line = line
        self.key = key
        self.text = text


class QatConf(Struct, frozen=True):
    """What a qat.conf says; None is what it does not speak of. `services_line` is where the services stand."""

    services: Services | None = None
    auto_reset: bool | None = None
    services_line: int | None = None


def parse(text: str, file: str = FILE) -> QatConf:
    """Read a qat.conf; an empty one wants nothing. Raises ConfigurationError."""
    services: Services | None = None
    auto_reset: bool | None = None
    lines: dict[str, int] = {}
    # Not splitlines(), which ends lines at characters where no editor does.
    for number, raw in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            raise ConfigurationError(file, f"{shown(line)} is not Key=value", number)
        if key in lines:
            raise ConfigurationError(file, f"stands in line {lines[key]} already; keep one of the two", number, key)
        try:
            if key == "ServicesEnabled":
                services = services_from(value.split(";"))
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


def services_from(words: Sequence[str]) -> Services:
    """Services from their names in any order, with spaces around them. Raises ValueError with what is wrong."""
    names = [word.strip() for word in words]
    if not any(names):
        raise ValueError(f"no service is named; known are {listed(SERVICES)}")
    for name in names:
        if not name:
            raise ValueError("there is nothing before or after a `;`")
        if name not in SERVICES:
            raise ValueError(f"unknown service {shown(name)}; known are {listed(SERVICES)}")
        if names.count(name) > 1:
            raise ValueError(f"{name} is named twice")
    return tuple(service for service in SERVICES if service in names)


def canonical(text: str | None) -> Services | None:
    """qat/cfg_services as read from a device; None when it is not there, or not to be understood."""
    try:
        return services_from((text or "").split(";"))
    except ValueError:
        return None


def _switch(value: str) -> bool:
    if value not in _SWITCH:
        raise ValueError(f"{shown(value)} is not on or off")
    return _SWITCH[value]
