"""Everything that neither process may do once it serves, attempted for real. Results are errnos, 0 for success.

The arguments are such that without a sandbox a call does no harm and does not fail with EPERM, so that an EPERM is
the sandbox's. As a program (`forbidden.py DIRECTORY`), it attempts everything unconfined and prints JSON.
"""

import ctypes
import errno
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

_AF_INET, _AF_INET6, _AF_NETLINK, _AF_VSOCK = 2, 10, 16, 40
_SIGCHLD, _FS, _VM, _SIGHAND, _THREAD, _NEWNS = 17, 0x200, 0x100, 0x800, 0x10000, 0x20000
_MAP_SHARED, _MAP_PRIVATE, _MAP_SHARED_VALIDATE, _MAP_ANONYMOUS = 1, 2, 3, 0x20
_MAP_PRIVATE_ANONYMOUS: Final = _MAP_PRIVATE | _MAP_ANONYMOUS
_READ_WRITE, _READ_EXEC = 3, 5
_CREATE: Final = os.O_WRONLY | os.O_CREAT
_SET_UID, _SET_GID = 0o4755, 0o2770

Arguments = tuple[int | None, ...]
CALLS: Final[dict[str, tuple[str, Callable[[], Arguments]]]] = {
    "execve": ("execve", lambda: (None, None, None)),
    "execveat": ("execveat", lambda: (-1, None, None, None, 0)),
    "ptrace": ("ptrace", lambda: (16, 0, None, None)),
    "mount": ("mount", lambda: (None, None, None, 0, None)),
    "umount": ("umount2", lambda: (None, 0)),
    "chroot": ("chroot", lambda: (None,)),
    "setns": ("setns", lambda: (-1, 0)),
    "unshare": ("unshare", lambda: (0,)),
    "bpf": ("bpf", lambda: (7, None, 1 << 20)),
    "keyctl": ("keyctl", lambda: (0, -2, 0)),
    "add_key": ("add_key", lambda: (None, None, None, 0, 0)),
    "process_vm_writev": ("process_vm_writev", lambda: (os.getpid(), None, 0, None, 0, 0)),
    "process_vm_readv": ("process_vm_readv", lambda: (os.getpid(), None, 0, None, 0, 0)),
    "pidfd_getfd": ("pidfd_getfd", lambda: (-1, 0, 0)),
    "pidfd_send_signal": ("pidfd_send_signal", lambda: (-1, 0, None, 0)),
    "kill": ("kill", lambda: (os.getpid(), 0)),
    "socket(AF_INET)": ("socket", lambda: (_AF_INET, 1, 0)),
    "socket(AF_INET6)": ("socket", lambda: (_AF_INET6, 2, 0)),
    "socket(AF_NETLINK, route)": ("socket", lambda: (_AF_NETLINK, 3, 0)),
    "clone(namespace)": ("clone", lambda: (_NEWNS | _FS | _SIGCHLD, None, None, None, None)),
    "clone3": ("clone3", lambda: (None, 0)),
    "memfd_create": ("memfd_create", lambda: (None, 0)),
    "userfaultfd": ("userfaultfd", lambda: (0x1001,)),
    "perf_event_open": ("perf_event_open", lambda: (None, 0, 0, 0, 1 << 30)),
    "personality": ("personality", lambda: (0xFFFFFFFF,)),
    "shmget": ("shmget", lambda: (0, 0, 0)),
    "mq_open": ("mq_open", lambda: (None, 0, 0, None)),
    "setuid": ("setuid", lambda: (os.getuid(),)),
    "prctl(PR_SET_DUMPABLE)": ("prctl", lambda: (4, 1, 0, 0, 0)),
    "prctl(PR_GET_SECUREBITS)": ("prctl", lambda: (27, 0, 0, 0, 0)),
    "setrlimit": ("prlimit64", lambda: (0, 4, -1, None)),
    "landlock_create_ruleset": ("landlock_create_ruleset", lambda: (None, 0, 1)),
    "seccomp": ("seccomp", lambda: (2, 0, None)),
    "wait4": ("wait4", lambda: (-1, None, 1, None)),
    "openat(set-uid)": ("openat", lambda: (-1, None, _CREATE, _SET_UID)),
    "openat(set-gid)": ("openat", lambda: (-1, None, _CREATE, _SET_GID)),
    "openat(O_TMPFILE, set-uid)": ("openat", lambda: (-1, None, os.O_WRONLY | os.O_TMPFILE, _SET_UID)),
    "openat2": ("openat2", lambda: (-1, None, None, 0)),
    "open(set-uid)": ("open", lambda: (None, _CREATE, _SET_UID)),
    "creat": ("creat", lambda: (None, _SET_UID)),
    "mkdirat(set-gid)": ("mkdirat", lambda: (-1, None, _SET_GID)),
    "mknod": ("mknod", lambda: (None, stat.S_IFREG | _SET_UID, 0)),
    "mknodat": ("mknodat", lambda: (-1, None, stat.S_IFREG | _SET_UID, 0)),
    "fchmod(set-uid)": ("fchmod", lambda: (-1, _SET_UID)),
    "fchmod(set-gid)": ("fchmod", lambda: (-1, _SET_GID)),
    "chmod(set-uid)": ("chmod", lambda: (None, _SET_UID)),
    "fchmodat(set-gid)": ("fchmodat", lambda: (-1, None, _SET_GID)),
    "fchmodat2": ("fchmodat2", lambda: (-1, None, 0o600, 0)),
    "fchown": ("fchown", lambda: (-1, 0, -1)),
    "chown": ("chown", lambda: (None, 0, 0)),
    "lchown": ("lchown", lambda: (None, -1, 0)),
    "fchownat": ("fchownat", lambda: (-1, None, -1, 0, 0)),
    "setxattr": ("setxattr", lambda: (None, None, None, 0, 0)),
    "lsetxattr": ("lsetxattr", lambda: (None, None, None, 0, 0)),
    "fsetxattr": ("fsetxattr", lambda: (-1, None, None, 0, 0)),
    "link": ("link", lambda: (None, None)),
    "linkat": ("linkat", lambda: (-1, None, -1, None, 0)),
    "mmap(MAP_SHARED)": ("mmap", lambda: (None, 4096, _READ_WRITE, _MAP_SHARED | _MAP_ANONYMOUS, -1, 0)),
    "mmap(MAP_SHARED of a file)": ("mmap", lambda: (None, 4096, _READ_WRITE, _MAP_SHARED, -1, 0)),
    "mmap(MAP_SHARED_VALIDATE)": ("mmap", lambda: (None, 4096, _READ_WRITE, _MAP_SHARED_VALIDATE, -1, 0)),
    "remap_file_pages": ("remap_file_pages", lambda: (None, 0, 0, 0, 0)),
}
"""Refused in both processes. By name: the system call and its arguments."""
HELPER_CALLS: Final[dict[str, tuple[str, Callable[[], Arguments]]]] = {
    "socket(AF_NETLINK, uevents)": ("socket", lambda: (_AF_NETLINK, 2, 15)),
    "clone(thread)": ("clone", lambda: (_VM | _THREAD, None, None, None, None)),
    "mmap(PROT_EXEC)": ("mmap", lambda: (None, 4096, _READ_EXEC, _MAP_PRIVATE_ANONYMOUS, -1, 0)),
    "mprotect(PROT_EXEC)": ("mprotect", lambda: (None, 0, _READ_EXEC)),
    "mmap(MAP_SHARED to read)": ("mmap", lambda: (None, 4096, 1, _MAP_SHARED, -1, 0)),
    "mmap(a file)": ("mmap", lambda: (None, 4096, 1, _MAP_PRIVATE, -1, 0)),
    "openat(0644)": ("openat", lambda: (-1, None, _CREATE, 0o644)),
    "openat(O_TMPFILE)": ("openat", lambda: (-1, None, os.O_WRONLY | os.O_TMPFILE, 0o600)),
    "mkdirat(0777)": ("mkdirat", lambda: (-1, None, 0o777)),
    "fchmod(0770)": ("fchmod", lambda: (-1, 0o770)),
    "fchown(group)": ("fchown", lambda: (-1, -1, 0)),
    "renameat2(exchange)": ("renameat2", lambda: (-1, None, -1, None, 2)),
    "symlinkat": ("symlinkat", lambda: (None, -1, None)),
    "pwrite64": ("pwrite64", lambda: (-1, None, 0, 4)),
    "lseek(a place)": ("lseek", lambda: (-1, 4, 0)),
    "bind": ("bind", lambda: (-1, None, 0)),
    "listen": ("listen", lambda: (-1, 0)),
}
SERVER_CALLS: Final[dict[str, tuple[str, Callable[[], Arguments]]]] = {
    "clone(process)": ("clone", lambda: (_SIGHAND | _SIGCHLD, None, None, None, None)),
}


def attempts(directory: Path, *, helper: bool) -> dict[str, int]:
    """Try everything. `directory` is outside the sandbox and holds a file `there`. Returns errnos by name."""
    results = {}
    for name, (call, arguments) in (CALLS | (HELPER_CALLS if helper else SERVER_CALLS)).items():
        number = _NUMBERS[call]
        if number >= 0:  # it exists on this architecture
            results[name] = _answer(lambda number=number, arguments=arguments: _syscall(number, *arguments()))  # type: ignore[misc]
    there, new = directory / "there", directory / "new"
    for name, path, flags in (
        ("read /etc/shadow", Path("/etc/shadow"), os.O_RDONLY),
        ("read /etc/passwd", Path("/etc/passwd"), os.O_RDONLY),
        ("read a file outside", there, os.O_RDONLY),
        ("write a file outside", there, os.O_WRONLY),
        ("append to a file outside", there, os.O_WRONLY | os.O_APPEND),
        ("create a file outside", new, os.O_WRONLY | os.O_CREAT),
    ):
        results[name] = _answer(lambda path=path, flags=flags: os.close(os.open(path, flags, 0o600)))  # type: ignore[misc]
    results["make a directory outside"] = _answer(lambda: os.mkdir(new.with_name("folder")))
    results["list a directory outside"] = _answer(lambda: os.listdir(directory))
    results["make a link outside"] = _answer(lambda: os.symlink("there", new.with_name("link")))
    results["truncate a file outside"] = _answer(lambda: os.truncate(there, 1))
    results["rename a file outside"] = _answer(lambda: os.rename(there, new.with_name("other")))
    results["remove a file outside"] = _answer(lambda: os.unlink(there if there.exists() else new.with_name("other")))
    return results


def unexpected(results: dict[str, int]) -> dict[str, str]:
    """The attempts that were not refused as they should be."""
    wrong = {}
    for name, number in results.items():
        allowed = {errno.ENOSYS} if name == "clone3" else {errno.EPERM, errno.EACCES}
        if number not in allowed:
            wrong[name] = errno.errorcode.get(number, "done")
    return wrong


def _answer(attempt: Callable[[], object]) -> int:
    try:
        attempt()
    except OSError as error:
        return error.errno or 0
    return 0


def _syscall(number: int, *arguments: int | None) -> None:
    given = [ctypes.c_void_p(None) if each is None else ctypes.c_long(each) for each in arguments]
    if _libc.syscall(ctypes.c_long(number), *given) == -1:
        raise OSError(ctypes.get_errno(), "")


_libc: Final = ctypes.CDLL(None, use_errno=True)
# Read everything that is needed before the sandbox applies.
_library = ctypes.CDLL("libseccomp.so.2")
_NUMBERS: Final = {
    call: int(_library.seccomp_syscall_resolve_name(call.encode()))
    for call, _ in (CALLS | HELPER_CALLS | SERVER_CALLS).values()
}

if __name__ == "__main__":
    print(json.dumps([attempts(Path(sys.argv[1]), helper=kind == "helper") for kind in sys.argv[2:]]))
