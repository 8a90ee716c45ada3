"""Confinement of the commands that read: they parse what others wrote, and in a cluster they run as root.

`kubectl exec` starts them outside the sandbox of the helper that serves.
"""

import os
import sys
import tomllib  # noqa: F401  (msgspec imports it on first use)
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from qat_shared.confinement import READ, WRITE_FILE, confine
from qat_shared.seccomp import Profile, Rule

_REFUSED: Final = Rule(
    names=(
        *("execve", "execveat", "socket", "socketpair", "ptrace", "process_vm_readv", "process_vm_writev"),
        *("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "pidfd_getfd"),
        # Its operations make sockets, and no seccomp filter sees them.
        "io_uring_setup",
        # Landlock mediates the first from Linux 6.2 on, and the others not at all.
        "truncate",
        *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
        *("utime", "utimes", "futimesat", "utimensat"),
        *("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"),
        *("setxattrat", "removexattrat", "file_setattr"),
        *("unshare", "setns", "memfd_create", "userfaultfd", "bpf", "keyctl", "add_key", "perf_event_open", "flock"),
        *("setpriority", "ioprio_set", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr"),
    ),
    action="SCMP_ACT_ERRNO",
)


def read_only(paths: Iterable[Path]) -> None:
    """Leave this process `paths` and Python's own files to read, and what it has open. Irreversible.

    Where the kernel lacks a layer, the others apply.
    """
    libraries = [Path(entry) for entry in sys.path if entry]
    rules = [*((path, READ) for path in (*paths, *libraries)), (Path(os.devnull), WRITE_FILE)]
    confine(rules, Profile(default_action="SCMP_ACT_ALLOW", default_errno_ret=1, syscalls=(_REFUSED,)))
