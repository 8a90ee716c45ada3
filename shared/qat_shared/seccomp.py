"""Restrict the process to the system calls of an OCI seccomp profile, through libseccomp.

Container runtimes load the same file (a Localhost profile), under which the process must also start. The process itself
skips the rules for its start, marked "start" in `comment`, which runtimes ignore. Formats: the OCI runtime
specification's seccomp section; seccomp_rule_add(3). libseccomp knows the system call numbers of each architecture and
builds the filter. It is called through ctypes: a binding has hundreds of lines, and four functions are needed.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

LIBRARY: Final = "libseccomp.so.2"
START: Final = "start"
_ACTIONS: Final = {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000}
_COMPARISONS: Final = {"SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}
_UNKNOWN: Final = -1  # __NR_SCMP_ERROR; smaller numbers belong to other architectures


class Argument(Struct, frozen=True, rename="camel"):
    """A condition on one argument of a system call."""

    index: int
    value: int
    op: str
    value_two: int = 0


class Rule(Struct, frozen=True, rename="camel"):
    """The action for some system calls when all of `args` hold."""

    names: tuple[str, ...]
    action: str
    args: tuple[Argument, ...] = ()
    errno_ret: int = 1
    comment: str = ""


class Profile(Struct, frozen=True, rename="camel"):
    """The parts of a profile that this module applies; the rest of the file is for container runtimes."""

    default_action: str
    default_errno_ret: int
    syscalls: tuple[Rule, ...]


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    ]


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises OSError, msgspec.MsgspecError."""
    return msgspec.json.decode(path.read_bytes(), type=Profile)


def prepare(profile: Profile) -> Callable[[], None]:
    """Build the filter. The returned function applies it to this thread and everything that it starts.

    Build it before Landlock, which may make the library unreadable. Both functions raise OSError.
    """
    library = ctypes.CDLL(LIBRARY)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(_action(profile.default_action, profile.default_errno_ret)))
    for rule in profile.syscalls:
        if rule.comment == START:
            continue
        conditions = (_Comparison * len(rule.args))(
            *(_Comparison(each.index, _COMPARISONS[each.op], each.value, each.value_two) for each in rule.args)
        )
        for name in rule.names:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number != _UNKNOWN:  # newer than the library: denied by default
                action = ctypes.c_uint32(_action(rule.action, rule.errno_ret))
                _check(library.seccomp_rule_add_array(context, action, number, len(rule.args), conditions))

    def load() -> None:
        _check(library.seccomp_load(context))
        library.seccomp_release(context)

    return load


def _action(name: str, errno: int) -> int:
    return _ACTIONS[name] | (errno if name == "SCMP_ACT_ERRNO" else 0)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
