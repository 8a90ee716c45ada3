"""The exact lists of system calls that pass the filters once the processes serve, found by trying every number.

A child process applies the profile with both of its answers replaced by errnos of their own. So the filter itself
answers each call: none is executed, and a refusal cannot be confused with an error of the kernel's.
"""

import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NoReturn

import pytest
from msgspec.structs import replace

from qat_helper import sandbox
from qat_server import host
from qat_shared.seccomp import LIBRARY, Profile, prepare, read_profile
from support.conditions import wait_until

PROFILES: Final = {
    "helper": read_profile(sandbox.PROFILE),
    "server": read_profile(Path(host.__file__ or "").with_name("seccomp.json")),
}
PASSES, REFUSED, UNANSWERED = 3001, 3002, 0
_PROBES_OWN: Final = {335, 336} if os.uname().machine == "x86_64" else set()
"""uretprobe and uprobe: the kernel's own trampolines. No filter sees them; any other caller is ended by a signal."""
NUMBERS: Final = [number for number in range(600) if number not in _PROBES_OWN]
"""All numbers of both architectures, and those that the kernel may give next."""
X32: Final = 0x40000000
"""The bit that x86_64's x32 calls have."""
BITS: Final = tuple(1 << bit for bit in range(64))
ONES: Final = (1 << 64) - 1

_Results = ctypes.Array[ctypes.c_uint16]
Call = tuple[int, ...]
"""A number and six arguments."""

_library: Final = ctypes.CDLL(LIBRARY)
_library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = [ctypes.c_ulong] * 7


def name_of(number: int) -> str:
    found = _library.seccomp_syscall_resolve_num_arch(ctypes.c_uint32(_library.seccomp_arch_native()), number)
    return ctypes.string_at(found).decode() if found else f"number {number}"


def number_of(name: str) -> int:
    return int(_library.seccomp_syscall_resolve_name(name.encode()))


def answers(profile: Profile, calls: Sequence[Call]) -> list[int]:
    """The filter's answer to each call: PASSES, REFUSED, or another errno that the profile names."""
    rules = [
        replace(rule, action="SCMP_ACT_ERRNO", errno_ret=PASSES) if rule.action == "SCMP_ACT_ALLOW" else rule
        for rule in profile.syscalls
    ]
    marked = replace(profile, default_errno_ret=REFUSED, syscalls=tuple(rules))
    with mmap.mmap(-1, 2 * len(calls) + 1) as shared:
        results = (ctypes.c_uint16 * len(calls)).from_buffer(shared)
        child = os.fork()
        if child == 0:
            _answer_all(marked, calls, results, shared)
        try:
            wait_until(lambda: shared[-1] == 1 or _has_ended(child), 60)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        found = list(results)
        del results
        return found


def _has_ended(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _answer_all(profile: Profile, calls: Sequence[Call], results: _Results, shared: mmap.mmap) -> NoReturn:
    prctl_no_new_privileges()
    system_call, errno_of = _libc.syscall, ctypes.get_errno
    prepare(profile)()
    for at, call in enumerate(calls):
        system_call(*call)
        results[at] = errno_of()
    shared[-1] = 1
    while True:  # the filter answers exit_group too, so the parent ends this process
        pass


def prctl_no_new_privileges() -> None:
    assert _libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS


def probes(profile: Profile, number: int) -> Iterator[Call]:
    """All arguments 0, all bits set, each bit of each argument by itself, and what the profile's rules compare with."""
    yield call(number)
    yield call(number, *[ONES] * 6)
    for rule in profile.syscalls:
        compared = {each.index: each.value_two if each.op == "SCMP_CMP_MASKED_EQ" else each.value for each in rule.args}
        yield call(number, *[compared.get(index, 0) for index in range(6)])
    for index in range(6):
        for value in BITS:
            yield call(number, *[0] * index, value)


def call(number: int, *arguments: int) -> Call:
    return (number, *arguments, *[0] * (6 - len(arguments)))


def passing(profile: Profile) -> tuple[set[str], set[str], dict[str, set[int]]]:
    """The calls that pass with any of the probes' arguments, those that pass with some, and other errnos by call."""
    always, sometimes, others = set(), set(), {}
    tried = [probe for number in NUMBERS for probe in probes(profile, number)]
    by_number: dict[int, set[int]] = {}
    for (number, *_), answer in zip(tried, answers(profile, tried), strict=True):
        by_number.setdefault(number, set()).add(answer)
    for number, seen in by_number.items():
        assert UNANSWERED not in seen, name_of(number)
        if seen == {PASSES}:
            always.add(name_of(number))
        elif PASSES in seen:
            sometimes.add(name_of(number))
        elif seen != {REFUSED}:
            others[name_of(number)] = seen
    return always, sometimes, others


def passing_values(profile: Profile, name: str, tried: Sequence[int], arguments: Callable[[int], Call]) -> list[int]:
    """Of the values `tried`, those with which a call passes."""
    found = answers(profile, [call(number_of(name), *arguments(value)) for value in tried])
    assert UNANSWERED not in found
    return [value for value, answer in zip(tried, found, strict=True) if answer == PASSES]


BOTH: Final = """
accept4 access brk clock_getres clock_gettime clock_nanosleep close close_range connect epoll_create1 epoll_ctl
epoll_pwait epoll_wait exit exit_group faccessat faccessat2 fdatasync flock fstat fsync futex getdents64 getegid geteuid
getgid getpid getrandom getsockname getsockopt gettid gettimeofday getuid lstat madvise mremap munmap newfstatat
poll ppoll pread64 read readlink readlinkat recvfrom recvmsg rename renameat restart_syscall rseq rt_sigaction
rt_sigprocmask rt_sigreturn sched_yield sendmsg sendto set_robust_list shutdown sigaltstack stat statx unlink unlinkat
write"""
ALWAYS: Final = {
    "helper": f"{BOTH} fork getppid",
    "server": f"""{BOTH} accept bind eventfd2 ftruncate getcwd getpeername inotify_add_watch inotify_init1
        inotify_rm_watch listen lseek mprotect nanosleep pipe2 pwrite64 readv renameat2 rmdir sched_getaffinity
        sched_getparam sched_getscheduler setsockopt symlink symlinkat sysinfo umask uname writev""",
}
"""The calls that pass with any arguments."""
SOMETIMES: Final = {
    "helper": "clone fcntl ioctl lseek mkdirat mmap mprotect openat prlimit64 renameat2 socket socketpair",
    "server": "chmod clone fchmodat fcntl ioctl mkdir mkdirat mmap openat prctl prlimit64 socket socketpair",
}
"""The calls that pass with some arguments; `ARGUMENTS` has them."""


def names(text: str) -> set[str]:
    """Those of the names that this architecture has."""
    return {name for name in text.split() if number_of(name) >= 0}


@pytest.mark.parametrize("process", PROFILES)
def test_these_calls_pass_and_no_others(process: str) -> None:
    always, sometimes, others = passing(PROFILES[process])
    assert always == names(ALWAYS[process])
    assert sometimes == names(SOMETIMES[process])
    assert others == {"clone3": {errno.ENOSYS}}
    assert {name for name, _, _, _ in ARGUMENTS[process]} == names(SOMETIMES[process]), "each is looked at below"


MODES: Final = range(0o10000)
PLAIN: Final = list(range(0o1000))
"""Modes without set-uid, set-gid and sticky."""
LOW: Final = [*range(1 << 12), *BITS[12:], *(value | 1 << 32 for value in range(1 << 12)), ONES]
CREATE, TMPFILE = os.O_CREAT, os.O_TMPFILE & ~os.O_DIRECTORY
NOT_EXECUTABLE: Final = [0, 1, 2, 3, 8, 9, 10, 11]
IOCTLS: Final = [0x5401, 0x5411, 0x5421, 0x5450, 0x5451]
NAMESPACES: Final = 0x7E020000
VM, THREAD = 0x100, 0x10000

Case = tuple[str, Sequence[int], Callable[[int], tuple[int, ...]], Sequence[int]]
"""A call, the values tried, the arguments with each, and the values with which it passes."""
EITHER: Final[tuple[Case, ...]] = (
    ("fcntl", LOW, lambda command: (0, command), [1, 2, 3, 4, 1030]),
    ("ioctl", [*range(1 << 16), *BITS[16:], 1 << 32 | 0x5401], lambda request: (0, request), IOCTLS),
    ("prlimit64", LOW, lambda new: (0, 0, new), [0]),
    ("socketpair", LOW, lambda family: (family,), [1]),
)
ARGUMENTS: Final[dict[str, tuple[Case, ...]]] = {
    "helper": (
        *EITHER,
        ("clone", BITS, lambda flags: (flags,), [bit for bit in BITS if not bit & (NAMESPACES | VM)]),
        ("socket", LOW, lambda family: (family,), [1]),
        ("lseek", LOW, lambda offset: (0, offset), [0]),
        ("renameat2", LOW, lambda flags: (0, 0, 0, 0, flags), [0, 1 << 32, *BITS[33:]]),
        # The kernel takes the lower 32 bits of a mode, and so does the filter.
        ("mkdirat", LOW, lambda mode: (0, 0, mode), [0o770, 1 << 32 | 0o770]),
        ("openat", BITS, lambda flags: (0, 0, flags, 0o4755), [bit for bit in BITS if bit not in (CREATE, TMPFILE)]),
        ("openat", LOW, lambda mode: (0, 0, CREATE, mode), [0o600, 1 << 32 | 0o600]),
        ("openat", MODES, lambda mode: (0, 0, os.O_TMPFILE, mode), []),
        ("openat", MODES, lambda mode: (0, 0, TMPFILE | CREATE, mode), []),
        ("mprotect", range(16), lambda protection: (0, 0, protection), NOT_EXECUTABLE),
        ("mmap", range(16), lambda protection: (0, 0, protection, 0x22), NOT_EXECUTABLE),
        ("mmap", range(64), lambda flags: (0, 0, 3, flags), [0x22, 0x32]),  # private and anonymous
        ("mmap", range(64), lambda flags: (0, 0, 1, flags), [0x22, 0x32]),
    ),
    "server": (
        *EITHER,
        ("clone", BITS, lambda flags: (flags,), []),
        (
            "clone",
            BITS,
            lambda flags: (VM | THREAD | flags,),
            [bit for bit in BITS if not bit & NAMESPACES],
        ),
        ("prctl", LOW, lambda option: (option,), [15]),
        ("socket", LOW, lambda family: (family,), [1]),
        ("socket", range(64), lambda protocol: (16, 3, protocol), [15]),
        ("chmod", MODES, lambda mode: (0, mode), PLAIN),
        ("fchmodat", MODES, lambda mode: (0, 0, mode), PLAIN),
        ("mkdir", MODES, lambda mode: (0, mode), PLAIN),
        ("mkdirat", MODES, lambda mode: (0, 0, mode), PLAIN),
        ("openat", BITS, lambda flags: (0, 0, flags, 0o4755), [bit for bit in BITS if bit not in (CREATE, TMPFILE)]),
        ("openat", MODES, lambda mode: (0, 0, CREATE, mode), PLAIN),
        ("openat", MODES, lambda mode: (0, 0, os.O_TMPFILE, mode), PLAIN),
        ("mmap", range(64), lambda flags: (0, 0, 3, flags), [0x02, 0x12, 0x22, 0x32]),  # private
    ),
}


@pytest.mark.parametrize("process", PROFILES)
def test_they_pass_with_these_arguments_and_no_others(process: str) -> None:
    for name, tried, arguments, expected in ARGUMENTS[process]:
        if number_of(name) >= 0:
            assert set(passing_values(PROFILES[process], name, tried, arguments)) == set(expected), name


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86_64 has a second way to number its calls")
@pytest.mark.parametrize("process", PROFILES)
def test_calls_of_another_architecture_end_the_process(process: str) -> None:
    """write, as x32 numbers it."""
    child = os.fork()
    if child == 0:
        prctl_no_new_privileges()
        prepare(PROFILES[process])()
        _libc.syscall(*call(X32 | 1))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSYS
