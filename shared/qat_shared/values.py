"""Parsers of option values that both processes share, so that a text means the same to both. All raise ValueError.

Booleans and numbers follow Go's flag package, since users know the server's flags from a Go program.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, TypeVar

_S = TypeVar("_S", bound=str)
_T = TypeVar("_T")

_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})
# Kubernetes adds such variables for each Service of the namespace (pkg/kubelet/envvars/envvars.go).
_SERVICE_LINK: Final = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_\w+)?)?)")


def boolean(text: str) -> bool:
    """true, false, t, f, 1, 0 (as strconv.ParseBool)."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"{shown(text)} is not true or false")


def integer(text: str, minimum: int | None = None, maximum: int = 2**31 - 1) -> int:
    """A decimal number from `minimum` (None: no limit) to `maximum`."""
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text, re.ASCII):
        raise ValueError(f"{shown(text)} is not a whole number")
    number = int(text)
    if minimum is not None and number < minimum:
        raise ValueError(f"{number} is too small, the minimum is {minimum}")
    if abs(number) > maximum:
        raise ValueError(f"{number} is too large, the maximum is {maximum}")
    return number


def by_name(names: Iterable[_S]) -> dict[str, _S]:
    """Words of a fixed set by their text, for `one_of`."""
    return {str(name): name for name in names}


def one_of(known: Mapping[str, _T], text: str) -> _T:
    """The value of a known word."""
    if text not in known:
        raise ValueError(f"unknown value {shown(text)}; known are {', '.join(known)}")
    return known[text]


def check_variables(names: Iterable[str], prefix: str, known: Collection[str], hint: Callable[[str], str]) -> None:
    """Refuse environment variables that begin with `prefix` and are not known: a misspelt one would have no effect.

    `hint` gives the advice about an unknown name. Raises ValueError with one sentence.
    """
    for name in sorted(names):
        if name.startswith(prefix) and name not in known:
            link = "a Service of this name sets it; set enableServiceLinks: false in the pod"
            raise ValueError(f"unknown variable {name}: {link if _SERVICE_LINK.fullmatch(name) else hint(name)}")


def shown(text: str) -> str:
    """A user's text for an error message: quoted, and cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
