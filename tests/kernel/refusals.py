"""Which system calls were refused to a process and all that it started, as the kernel's own tracing tells.

A call that a seccomp filter refuses never begins, but it ends like any other: raw_syscalls:sys_exit shows it with its
answer. So does one that Landlock refuses, or the ordinary permissions. Nothing of the traced processes is changed.
"""

import ctypes
import errno
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from msgspec import Struct

_library: Final = ctypes.CDLL("libseccomp.so.2")
_library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_char_p


def _name(call: int) -> str:
    text = _library.seccomp_syscall_resolve_num_arch(0, call)
    return text.decode() if text else str(call)


_TRACING: Final = Path("/sys/kernel/tracing/instances")
_EVENT: Final = "events/raw_syscalls/sys_exit"
_ANSWERS: Final = (errno.EPERM, errno.EACCES, errno.ENOSYS)
_LINE: Final = re.compile(r"^ *(.*)-(\d+) +\[.*sys_exit: NR (-?\d+) = (-?\d+)$")
_FILTER: Final = " || ".join(
    [
        *(f"ret == -{number}" for number in _ANSWERS),
        f"(id == {_library.seccomp_syscall_resolve_name(b'seccomp')} && ret == 0)",
    ]
)
_FOLLOW: Final = 'echo $$ >>"$0" && exec "$@"'


class Refusal(Struct, frozen=True):
    """`process`: the thread's name; `call`: the system call's; `errno`: EPERM, EACCES or ENOSYS."""

    process: str
    call: str
    errno: str


class Refusals:
    """Made by `refusals`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def wrapper(self) -> tuple[str, ...]:
        """What a program, and all that it will start, is traced from its start by."""
        return ("sh", "-c", _FOLLOW, str(self._directory / "set_event_pid"))

    def seen(self) -> "Counter[Refusal]":
        """How often each so far; of a process that has confined itself, since then.

        Raises AssertionError when the kernel had to drop some.
        """
        for stats in self._directory.glob("per_cpu/cpu*/stats"):
            assert re.search(r"^overrun: 0$", stats.read_text(), re.MULTILINE), stats.read_text()
        found: defaultdict[str, Counter[Refusal]] = defaultdict(Counter)
        for line in (self._directory / "trace").read_text().splitlines():
            if match := _LINE.match(line):
                name, pid, call, answer = match[1], match[2], _name(int(match[3])), int(match[4])
                if answer == 0:  # a filter is on
                    found[pid].clear()
                else:
                    found[pid][Refusal(name, call, errno.errorcode[-answer])] += 1
        return sum(found.values(), Counter())


@contextmanager
def refusals() -> Iterator[Refusals]:
    """An instance of tracing of its own, while the block runs."""
    directory = _TRACING / "qat-refusals"
    directory.mkdir()
    try:
        (directory / "buffer_size_kb").write_text("4096")
        (directory / "options/event-fork").write_text("1")
        (directory / _EVENT / "filter").write_text(_FILTER)
        # Without a process named, it would be all: an impossible one is, until a program names itself.
        (directory / "set_event_pid").write_text("4194304")
        (directory / _EVENT / "enable").write_text("1")
        yield Refusals(directory)
    finally:
        (directory / _EVENT / "enable").write_text("0")
        directory.rmdir()
