"""Irreversible self-confinement of a process: capabilities, no_new_privs, core dumps, Landlock, seccomp.

Both processes apply it once, before they start threads: every layer belongs to a thread and is inherited by what the
thread starts. No layer can be undone, and none grants anything. Sources: capabilities(7), prctl(2), the kernel's
Documentation/userspace-api/landlock.rst.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from qat_shared import seccomp
from qat_shared.seccomp import Profile

_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_HEADER: Final = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
_NO_CAPABILITIES: Final = bytes(24)

# The C library has no wrappers for these; the numbers are the same on all architectures.
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_RULESET_VERSION: Final = 1
_PATH_BENEATH: Final = 1

WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
REMOVE_DIR: Final = 1 << 4
REMOVE_FILE: Final = 1 << 5
MAKE_DIR: Final = 1 << 7
MAKE_REG: Final = 1 << 8
MAKE_SOCK: Final = 1 << 9
MAKE_SYM: Final = 1 << 12
TRUNCATE: Final = 1 << 14
READ: Final = READ_FILE | READ_DIR
_OF_FILES: Final = WRITE_FILE | READ_FILE | TRUNCATE
_FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many file system rights an ABI knows, as the lowest bits; 16 from ABI 5 on."""

Rules = Iterable[tuple[Path, int]]
"""Paths, and the rights to them and to everything beneath them."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def confine(rules: Rules, profile: Profile, *, traceable: bool = False) -> dict[str, str]:
    """Drop all capabilities, all file access that `rules` do not grant and all system calls outside `profile`.

    Returns, by layer, why it is missing, "" when it is in place. Rules for paths that do not exist are skipped.
    `traceable`: other processes of the same user may still trace this one.
    """
    load: Callable[[], object]
    try:
        load = seccomp.prepare(profile)
    except OSError as error:
        load = partial(_fail, error)
    layers: tuple[tuple[str, Callable[[], object]], ...] = (
        ("capabilities", _drop_capabilities),
        ("no-new-privs", lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1)),
        ("no-core-dumps", lambda: _forbid_tracing(traceable=traceable)),
        ("landlock", lambda: _restrict_files(rules)),
        ("seccomp", load),
    )
    state = {}
    for name, apply in layers:
        try:
            apply()
            state[name] = ""
        except OSError as error:
            state[name] = error.strerror or str(error)
    return state


def nearest(path: Path) -> Path:
    """The path or its nearest existing ancestor: Landlock rules cannot name paths that do not exist yet."""
    while not path.exists():
        path = path.parent
    return path


def missing(state: Mapping[str, str]) -> str:
    """The missing layers in `confine`'s result as one text, "" when all are in place."""
    return "; ".join(f"{layer}: {why}" for layer, why in state.items() if why)


def _fail(error: OSError) -> None:
    raise error


def _drop_capabilities() -> None:
    try:
        if os.geteuid() == 0:  # without root, the bounding set grants nothing
            _empty_bounding_set()
    finally:
        _call(_libc.capset(_CAPABILITY_HEADER, _NO_CAPABILITIES))
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def _empty_bounding_set() -> None:
    number = 0
    while (present := _libc.prctl(_PR_CAPBSET_READ, ctypes.c_ulong(number), *_zeros(3))) >= 0:
        if present and _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), *_zeros(3)) < 0:
            raise OSError(0, "cannot empty the bounding set without CAP_SETPCAP")
        number += 1


def _forbid_tracing(*, traceable: bool) -> None:
    if traceable:
        raise OSError(0, "the process is to stay traceable")
    _prctl(_PR_SET_DUMPABLE, 0)


def _restrict_files(rules: Rules) -> None:
    try:
        abi = _syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_RULESET_VERSION))
    except OSError as error:
        raise OSError(0, f"not available in this kernel (needs 5.13 or newer) or container ({error})") from error
    handled = (1 << _FILE_RIGHTS.get(abi, 16)) - 1
    # TCP (bind, connect) from ABI 4 on; abstract sockets and signals to outside processes from ABI 6 on.
    attributes = struct.pack("QQQ", handled, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = _syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    try:
        for path, rights in rules:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                of_kind = handled if stat.S_ISDIR(os.fstat(descriptor).st_mode) else _OF_FILES & handled
                rule = struct.pack("=Qi", rights & of_kind, descriptor)
                _syscall(_LANDLOCK_ADD_RULE, ruleset, _PATH_BENEATH, rule, ctypes.c_uint(0))
            finally:
                os.close(descriptor)
        _syscall(_LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint(0))
    finally:
        os.close(ruleset)


def _syscall(number: int, *arguments: object) -> int:
    return _call(_libc.syscall(ctypes.c_long(number), *arguments))


def _prctl(option: int, argument: int) -> None:
    _call(_libc.prctl(option, ctypes.c_ulong(argument), *_zeros(3)))


def _zeros(number: int) -> list[ctypes.c_ulong]:
    return [ctypes.c_ulong(0)] * number


def _call(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
