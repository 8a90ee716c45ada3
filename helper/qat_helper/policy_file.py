"""The policy file: TOML of root's that restricts the built-in policy. Read once, before the helper serves.

Owns the file's keys, and the sentences about what is wrong in it. Pure but for reading the files.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from qat_helper.policy import ALL, Policy, Rate
from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_shared.messages import DpdkDriver, SocketDirectory
from qat_shared.pci import PciAddress
from qat_shared.values import by_name, one_of

FILE_LIMIT: Final = 64 * 1024
_QUOTED: Final = re.compile(r""" "(?:\\.|[^"\\])*" | '[^']*' """, re.VERBOSE)
_MOST_DOTS: Final = 32
_MOST: Final = 1_000_000
"""The largest burst, and the most requests per second, that a file may set."""


class PolicyError(Exception):
    """The policy file cannot be used. The message is one sentence."""


def narrow(builtin: Policy, path: Path, owner: int) -> Policy:
    """The built-in policy, restricted by a TOML file or by all files of a directory together.

    What a key lists in several files is allowed by each of them. `owner`: the uid, other than root, that may own a
    file. Raises PolicyError: one sentence with file, line and key.
    """
    # A parser raises ValueError. Its first argument is the sentence; the others are words that follow the key in the
    # file, by which _line finds the faulty line.
    ids = {f"{VENDOR_INTEL:04x}:{number:04x}": (VENDOR_INTEL, number) for number in sorted([*PHYSICAL, *VIRTUAL])}
    parsers: dict[str, Callable[[Any], Any]] = {
        "operations": partial(_list, _known(builtin.operations)),
        "addresses": partial(_list, PciAddress.parse),
        "device_ids": partial(_list, partial(one_of, ids)),
        "drivers": partial(_list, _known(list(DpdkDriver))),
        "directories": partial(_list, _known(list(SocketDirectory))),
        "max_vfs": partial(_whole, 0, 0xFFFF),
        "rates": partial(_rates, _known(builtin.operations | {ALL})),
    }
    changes: dict[str, Any] = {}
    for file, text in _texts(path, owner):
        for key, value in _parse(file, text).items():
            try:
                if key not in parsers:
                    raise ValueError(f"unknown key; known are {', '.join(parsers)}")
                parsed = parsers[key](value)
                if key in changes and not isinstance(parsed, frozenset):
                    raise ValueError("is set in another file too: keep one of them")
                changes[key] = parsed | changes.get(key, parsed)
            except ValueError as error:
                message, *words = error.args
                raise PolicyError(f"{file} line {_line(text, key, *words)}: {key}: {message}") from None
    changes["rates"] = {**builtin.rates, **changes.get("rates", {})}
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
    if others := [str(each) for each in files if each.suffix != ".toml"]:
        raise PolicyError(f"{others[0]} is not a .toml file: a directory of policy files must have nothing else")
    if not files:
        raise PolicyError(f"{path} has no policy file: without any, all would be allowed")
    return files


def _parse(path: Path, text: str) -> dict[str, Any]:
    import tomllib  # noqa: PLC0415  not without a policy file: the module takes memory

    # tomllib takes time and memory that grow with the square of a dotted key's length.
    for at, content in enumerate(text.split("\n"), 1):
        if _QUOTED.sub("", content).count(".") > _MOST_DOTS:
            raise PolicyError(f"{path} line {at}: has more than {_MOST_DOTS} dots outside quotes")
    try:
        return tomllib.loads(text)
    except (RecursionError, ValueError) as error:
        message, _, place = str(error).partition(" (at ")
        line = re.match(r"line ([0-9]+)", place)
        number = line[1] if line else text.count("\n") + 1  # at the end of the document
        what = "nested too deeply" if isinstance(error, RecursionError) else message
        raise PolicyError(f"{path} line {number}: not valid TOML: {what}") from None


def _line(text: str, *words: str) -> int:
    """The number of the line with the last of `words` that is found, each at or after the line of the one before."""
    position = 0
    for word in words:
        found = re.compile(rf"^[^#\n]*(?<![\w-]){re.escape(word)}(?![\w-])", re.MULTILINE).search(text, position)
        position = found.start() if found else position
    return text.count("\n", 0, position) + 1


def _list(parse: Callable[[str], object], value: Any) -> frozenset[object]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError('is not a list of texts in quotes, such as ["a", "b"]')
    found = set()
    for each in value:
        try:
            found.add(parse(each))
        except ValueError as error:
            raise ValueError(str(error), each) from None
    return frozenset(found)


def _known(names: Iterable[str]) -> Callable[[str], str]:
    return partial(one_of, by_name(sorted(names)))


def _whole(least: int, most: int, value: Any, name: str = "") -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}is not a whole number from {least} to {most}")
    return value


def _rates(name_of: Callable[[str], str], value: Any) -> dict[str, Rate]:
    rates = {}
    for name, rate in value.items() if isinstance(value, dict) else [("", None)]:
        try:
            if not isinstance(rate, dict) or rate.keys() != {"burst", "per_second"}:
                raise ValueError("is not of the form rates.NAME = { burst = 64, per_second = 2 }")
            per_second = rate["per_second"]
            if type(per_second) not in (int, float) or not 0 < per_second <= _MOST:
                raise ValueError(f"per_second is not a number above 0 and up to {_MOST}")
            rates[name_of(name)] = Rate(burst=_whole(1, _MOST, rate["burst"], "burst "), per_second=per_second)
        except ValueError as error:
            raise ValueError(f"{name}: {error}".removeprefix(": "), name) from None
    return rates


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
