"""The system calls that a process may still make: an OCI seccomp profile, loaded through libseccomp.

The same file serves a container runtime (Localhost profile), under which the process also has to start, and the process
itself, which leaves out the rules marked "start" (a `comment`, which runtimes do not read). Formats: the OCI runtime
specification's seccomp section; seccomp_rule_add(3). libseccomp knows the system calls' numbers on each architecture,
and writes the filter; it is loaded here by hand, since of the hundreds of lines of a binding four functions are needed.
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
_UNKNOWN: Final = -1  # __NR_SCMP_ERROR; smaller ones are of other architectures


class Argument(Struct, frozen=True, rename="camel"):
    """A condition on one argument of a system call."""

    index: int
    value: int
    op: str
    value_two: int = 0


class Rule(Struct, frozen=True, rename="camel"):
    """What to do about some system calls when all of `args` hold."""

    names: tuple[str, ...]
    action: str
    args: tuple[Argument, ...] = ()
    errno_ret: int = 1
    comment: str = ""


class Profile(Struct, frozen=True, rename="camel"):
    """As far as ours go; all else that is in the file is for container runtimes."""

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
    """Raises OSError, msgspec.MsgspecError."""
    return msgspec.json.decode(path.read_bytes(), type=Profile)


def prepare(profile: Profile) -> Callable[[], None]:
    """Make the filter: what to call to have it on this thread and all that it starts, from then on.

    Made beforehand, since Landlock may keep the library from being read. Both raise OSError.
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
            if number != _UNKNOWN:  # newer than the library: refused, as what is not in the profile
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
