"""The policy file: TOML of root's that restricts the built-in policy. Read once, before the helper serves.

Owns the file's keys, and the sentences about what is wrong in it. Pure but for reading the files.
"""

import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

import msgspec

from qat_helper.policy import ALL, Id, Policy, Rate, is_qat
from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_shared.messages import DpdkDriver, KubeletService, SocketDirectory
from qat_shared.pci import PciAddress
from qat_shared.values import shown

FILE_LIMIT: Final = 64 * 1024
_MOST: Final = 1_000_000
"""The largest burst, and the most requests per second, that a file may set."""


class PolicyError(Exception):
    """The policy file cannot be used. The message is one sentence."""


class _InvalidError(Exception):
    """A value is invalid. `words` follow its key in the file, and lead to its line."""

    def __init__(self, text: str, *words: str) -> None:
        super().__init__(text)
        self.words = words


def narrow(builtin: Policy, path: Path, owner: int) -> Policy:
    """The built-in policy, restricted by a TOML file or by all files of a directory together.

    What a key lists in several files is allowed by each of them. `owner`: the uid, other than root, that may own a
    file. Raises PolicyError: one sentence with file, line and key.
    """
    parsers: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "operations": ("operations", _each(_one_of(builtin.operations, "operation"))),
        "addresses": ("addresses", _each(_address)),
        "device_ids": ("device_ids", _each(_id)),
        "drivers": ("drivers", _each(_one_of(list(DpdkDriver), "driver"))),
        "directories": ("directories", _each(_one_of(list(SocketDirectory), "directory"))),
        "kubelet_services": ("services", _each(_one_of(list(KubeletService), "service"))),
        "max_vfs": ("max_vfs", _max_vfs),
        "rates": ("rates", _rates(builtin.operations | {ALL})),
    }
    changes: dict[str, Any] = {}
    for file, text in _texts(path, owner):
        for key, value in _parse(file, text).items():
            try:
                if key not in parsers:
                    raise _InvalidError(f"unknown key; known are {', '.join(parsers)}")
                field, parse = parsers[key]
                changes[field] = _join(changes.get(field), parse(value))
            except _InvalidError as error:
                raise PolicyError(f"{file} line {_line(text, key, *error.words)}: {key}: {error}") from None
    if "rates" in changes:
        changes["rates"] = {**builtin.rates, **changes["rates"]}
    return msgspec.structs.replace(builtin, **changes)


def _texts(path: Path, owner: int) -> list[tuple[Path, str]]:
    try:
        return [(file, _read(file, owner)) for file in _files(path)]
    except OSError as error:
        raise PolicyError(f"the policy file {path} cannot be read: {os.strerror(error.errno or 0)}") from error


def _files(path: Path) -> list[Path]:
    """The file, or the files of the directory. A ConfigMap's mount has them in ..data (kubelet: atomic_writer.go)."""
    if not path.is_dir():
        return [path]
    data = path / "..data"
    files = sorted(each for each in (data if data.is_dir() else path).iterdir() if not each.name.startswith("."))
    for each in files:
        if each.suffix != ".toml":
            raise PolicyError(f"{each} is not a .toml file: a directory of policy files must have nothing else")
    if not files:
        raise PolicyError(f"{path} has no policy file: without any, all would be allowed")
    return files


def _parse(path: Path, text: str) -> dict[str, Any]:
    import tomllib  # noqa: PLC0415  most helpers have no policy file, and the module takes memory

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        line = place.removeprefix("line ").partition(",")[0] if place.startswith("line ") else text.count("\n") + 1
        raise PolicyError(f"{path} line {line}: not valid TOML: {message}") from None
    except RecursionError:
        raise PolicyError(f"{path}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # a date or number out of Python's range
        raise PolicyError(f"{path}: not valid TOML: {error}") from None


def _line(text: str, *words: str) -> int:
    """The number of the line with the last of `words` that is found, each at or after the line of the one before."""
    position = 0
    for word in words:
        found = re.compile(rf"^[^#\n]*(?<![\w-]){re.escape(word)}(?![\w-])", re.MULTILINE).search(text, position)
        position = found.start() if found else position
    return text.count("\n", 0, position) + 1


def _join(before: Any, value: Any) -> Any:
    if before is None:
        return value
    if not isinstance(value, frozenset):
        raise _InvalidError("is set in another file too: keep one of them")
    return before | value


def _each(parse: Callable[[str], object]) -> Callable[[Any], frozenset[object]]:
    def parse_list(value: Any) -> frozenset[object]:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise _InvalidError('is not a list of texts in quotes, such as ["a", "b"]')
        return frozenset(map(parse, value))

    return parse_list


def _one_of(known: Collection[str], kind: str) -> Callable[[str], str]:
    by_name = {str(name): name for name in sorted(known)}

    def parse(text: str) -> str:
        if text not in by_name:
            raise _InvalidError(f"unknown {kind} {shown(text)}; known are {', '.join(by_name)}", text)
        return by_name[text]

    return parse


def _address(text: str) -> PciAddress:
    try:
        return PciAddress.parse(text)
    except ValueError:
        raise _InvalidError(
            f"{shown(text)} is not a PCI address as sysfs writes it, in lower case and with its domain: 0000:6b:00.1",
            text,
        ) from None


def _id(text: str) -> Id:
    match = re.fullmatch(r"([0-9a-f]{4}):([0-9a-f]{4})", text, re.ASCII)
    found = (int(match[1], 16), int(match[2], 16)) if match else (0, 0)
    if not is_qat(*found):
        known = ", ".join(f"{VENDOR_INTEL:04x}:{number:04x}" for number in sorted([*PHYSICAL, *VIRTUAL]))
        raise _InvalidError(f"{shown(text)} is not the id of a QAT device; known are {known}", text)
    return found


def _max_vfs(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 0xFFFF:
        raise _InvalidError("is not a whole number from 0 to 65535")
    return value


def _rates(known: frozenset[str]) -> Callable[[Any], dict[str, Rate]]:
    name_of = _one_of(known, "operation")

    def parse(value: Any) -> dict[str, Rate]:
        if not isinstance(value, dict):
            raise _InvalidError("is not a table by operation, such as rates.all = { burst = 64, per_second = 2 }")
        return {name_of(name): _rate(name, rate) for name, rate in value.items()}

    return parse


def _rate(name: str, value: Any) -> Rate:
    if not isinstance(value, dict) or value.keys() != {"burst", "per_second"}:
        raise _InvalidError(f"{name} is not of the form {{ burst = 64, per_second = 2 }}", name)
    burst, per_second = value["burst"], value["per_second"]
    if type(burst) is not int or not 1 <= burst <= _MOST:
        raise _InvalidError(f"{name}: burst is not a whole number from 1 to {_MOST}", name, "burst")
    if type(per_second) not in (int, float) or not 0 < per_second <= _MOST:
        raise _InvalidError(f"{name}: per_second is not a number above 0 and up to {_MOST}", name, "per_second")
    return Rate(burst=burst, per_second=per_second)


def _read(path: Path, owner: int) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PolicyError(f"the policy file {path} is not a regular file")
        # The directory after resolving links, which a ConfigMap's files are. Anybody who can write there could
        # substitute another root-owned file.
        folder = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent
        for what, info in ((f"the policy file {path}", status), (f"{folder}, where {path} is,", os.stat(folder))):
            if info.st_uid not in (0, owner):
                raise PolicyError(f"{what} belongs to uid {info.st_uid}: change the owner to root")
            if info.st_mode & 0o022:
                raise PolicyError(f"{what} can be written by others: run chmod go-w, or use another directory")
        content = os.read(descriptor, FILE_LIMIT + 1)
    finally:
        os.close(descriptor)
    if len(content) > FILE_LIMIT:
        raise PolicyError(f"the policy file {path} is longer than {FILE_LIMIT} bytes")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PolicyError(f"{path} line {line}: not UTF-8 text") from None
