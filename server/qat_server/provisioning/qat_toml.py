"""`qat.toml`: settings that differ between PFs. Pure: text in, QatToml or ConfigurationError out. The whole schema:

    heartbeat_interval = "5s"    # or seconds as a number; 0 is off

    [defaults]                   # for every PF; any of:
    services = "sym;asym"        # as in qat.conf, or a list of names
    auto_reset = true
    vfs = "all"                  # or a number; the QAT driver supports only 0 and all
    pm_idle_enabled = true

    [[rules]]                    # any number of rules; at least one of these three, and the PF must match all given:
    address = "0000:6b:00.0"
    device_id = "4940"           # or 0x4940
    numa_node = 0
    services = ["dc"]            # and any setting of [defaults], at least one

Where several rules match a PF, each setting comes from the most specific rule that has it (configuration.py applies
them). A rule with an address precedes one without, then one with a device id, then one with a NUMA node. So the order
of rules has no effect, and two rules with the same selector are an error.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from qat_server.devices.inventory import PhysicalFunction
from qat_server.parsing import values
from qat_server.provisioning.qat_conf import ConfigurationError, Services, parse_services
from qat_shared.devices import PHYSICAL
from qat_shared.pci import PciAddress
from qat_shared.values import shown

FILE: Final = "qat.toml"
ALL: Final = "all"

_SHORTEST_HEARTBEAT: Final = 0.01  # seconds, as for the flag
_LINES_SEARCHED: Final = 500
_AT_LINE: Final = re.compile(r" \(at line ([0-9]+), column [0-9]+\)$", re.ASCII)
_AT_PATH: Final = re.compile(r" - at `\$\.?(.*)`$")
_STEP: Final = re.compile(r"\[([0-9]+)\]|([^.\[\]]+)", re.ASCII)
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,60}", re.ASCII)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`$", re.DOTALL)

_Count = Annotated[int, Meta(ge=0, le=0xFFFF)]


class PfSettings(Struct, frozen=True):
    """The settings of a rule or of the defaults; None for those they do not have. `vfs` may be ALL."""

    services: Services | None = None
    auto_reset: bool | None = None
    vfs: int | str | None = None
    pm_idle_enabled: bool | None = None


class Rule(Struct, frozen=True):
    """Settings for the PFs that match every selector that is not None. `name` is for messages: rules[0]."""

    name: str
    address: PciAddress | None
    device_id: int | None
    numa_node: int | None
    settings: PfSettings

    def matches(self, pf: PhysicalFunction) -> bool:
        """Whether the rule applies to this PF."""
        return (
            self.address in (None, pf.address)
            and self.device_id in (None, pf.device_id)
            and self.numa_node in (None, pf.numa_node)
        )

    @property
    def specificity(self) -> tuple[bool, bool, bool]:
        """Larger is more specific. Two rules that match the same PF are never equally specific."""
        return (self.address is not None, self.device_id is not None, self.numa_node is not None)


class QatToml(Struct, frozen=True):
    """The contents of a qat.toml. `rules` have the most specific first; the interval is in seconds, 0 is off."""

    heartbeat_interval: float | None = None
    defaults: PfSettings = PfSettings()
    rules: tuple[Rule, ...] = ()


class _Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    services: str | tuple[str, ...] | None = None
    auto_reset: bool | None = None
    vfs: _Count | str | None = None
    pm_idle_enabled: bool | None = None


class _Rule(_Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    address: str | None = None
    device_id: int | str | None = None
    numa_node: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None


class _File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    heartbeat_interval: str | int | float | None = None
    defaults: _Settings = _Settings()
    rules: tuple[_Rule, ...] = ()


class _KeyError(Exception):
    """The value at a path of keys and indices is invalid."""

    def __init__(self, path: Sequence[str | int], text: str) -> None:
        super().__init__(text)
        self.path = path


def parse(text: str, file: str = FILE) -> QatToml:
    """Read a qat.toml; an empty one has no settings. Raises ConfigurationError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, at_end, _ = str(error).partition(" (at end of document)")
        at = _AT_LINE.search(message)
        line = len(text.rstrip().split("\n")) if at_end else int(at[1]) if at else None
        raise ConfigurationError(file, _AT_LINE.sub("", message), line) from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a date or number out of Python's range
        raise ConfigurationError(file, f"cannot be parsed as TOML: {error}") from None
    try:
        return _read(_convert(table))
    except _KeyError as error:
        raise ConfigurationError(file, str(error), _line(text, error.path), _shown_path(error.path)) from None


def _convert(table: dict[str, Any]) -> _File:
    try:
        return msgspec.convert(table, _File)
    except msgspec.ValidationError as error:
        message = str(error)
        at = _AT_PATH.search(message)
        path: list[str | int] = [int(index) if index else key for index, key in _STEP.findall(at[1] if at else "")]
        message = _AT_PATH.sub("", message)
        if unknown := _UNKNOWN.search(message):
            path.append(unknown[1])
            message = f"unknown key; known are {_known(path)}"
        raise _KeyError(path, (message[:1].lower() + message[1:]).replace("`object`", "`table`")) from None


def _known(path: Sequence[str | int]) -> str:
    kind = _Rule if path[0] == "rules" else _Settings if path[0] == "defaults" and len(path) > 1 else _File
    return values.listed(tuple(field.name for field in msgspec.structs.fields(kind)))


def _read(file: _File) -> QatToml:
    rules: dict[tuple[object, ...], Rule] = {}
    for number, given in enumerate(file.rules):
        rule = _rule(number, given)
        selector = (rule.address, rule.device_id, rule.numa_node)
        if twin := rules.get(selector):
            raise _KeyError(("rules", number), f"selects the same PFs as {twin.name}; merge the two rules")
        rules[selector] = rule
    return QatToml(
        heartbeat_interval=_heartbeat(file.heartbeat_interval),
        defaults=_settings(("defaults",), file.defaults),
        rules=tuple(sorted(rules.values(), key=lambda rule: rule.specificity, reverse=True)),
    )


def _rule(number: int, given: _Rule) -> Rule:
    path = ("rules", number)
    if given.address is None and given.device_id is None and given.numa_node is None:
        raise _KeyError(path, "selects no PF; add address, device_id or numa_node, or use [defaults] for all PFs")
    settings = _settings(path, given)
    if settings == PfSettings():
        raise _KeyError(path, "has no setting; add services, auto_reset, vfs or pm_idle_enabled")
    try:
        address = None if given.address is None else PciAddress.parse(given.address.strip().lower())
    except ValueError as error:
        raise _KeyError((*path, "address"), str(error)) from None
    return Rule(
        name=f"rules[{number}]",
        address=address,
        device_id=_device_id((*path, "device_id"), given.device_id),
        numa_node=given.numa_node,
        settings=settings,
    )


def _settings(path: Sequence[str | int], given: _Settings) -> PfSettings:
    services = given.services
    if services is not None:
        try:
            services = parse_services(services.split(";") if isinstance(services, str) else services)
        except ValueError as error:
            raise _KeyError((*path, "services"), str(error)) from None
    if isinstance(given.vfs, str) and given.vfs != ALL:
        raise _KeyError((*path, "vfs"), f'{shown(given.vfs)} is neither a number nor "{ALL}"')
    return PfSettings(services, given.auto_reset, given.vfs, given.pm_idle_enabled)


def _device_id(path: Sequence[str | int], given: int | str | None) -> int | None:
    if given is None:
        return None
    known = {f"{device_id:04x}": device_id for device_id, kind in PHYSICAL.items() if kind.provisioned}
    text = f"{given:04x}" if isinstance(given, int) else given.strip().lower().removeprefix("0x")
    if text not in known:
        # A decimal 4940 is 134c: show the value as it was read.
        was = f"{given} (0x{text})" if isinstance(given, int) else shown(given)
        raise _KeyError(path, f"{was} is not a PF that can be provisioned; known are {values.listed(tuple(known))}")
    return known[text]


def _heartbeat(given: str | float | None) -> float | None:
    if given is None:
        return None
    try:
        return values.duration(str(given), _SHORTEST_HEARTBEAT, zero_is_off=True)
    except ValueError as error:
        raise _KeyError(("heartbeat_interval",), str(error)) from None


def _line(text: str, path: Sequence[str | int]) -> int | None:
    """The line on which the value at `path` begins.

    tomllib keeps no line numbers, so this finds the shortest leading part of the text that contains the value.
    """
    lines = text.split("\n")
    if not path or len(lines) > _LINES_SEARCHED:
        return None
    begins = 1
    for number in range(1, len(lines) + 1):
        try:
            table = tomllib.loads("\n".join(lines[:number]))
        except (ValueError, RecursionError):
            continue  # in the middle of a value that spans lines
        if _has(table, path):
            return begins
        begins = number + 1
    return None


def _has(value: object, path: Sequence[str | int]) -> bool:
    for step in path:
        if isinstance(step, int):
            if not isinstance(value, list) or step >= len(value):
                return False
            value = value[step]
        else:
            if not isinstance(value, Mapping) or step not in value:
                return False
            value = value[step]
    return True


def _shown_path(path: Sequence[str | int]) -> str:
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{_key(step)}" for step in path)
    return steps.removeprefix(".")


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else shown(key)
