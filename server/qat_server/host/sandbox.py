"""What the server leaves itself before it has threads: which files, which system calls.

    read    <sysfs>/bus/pci, devices, ...; its own code; /proc; the time zone; the provisioning configuration
    write   the endpoints' directory; the directory of the log files, where any were asked for

No socket but Unix ones and the kernel's uevents can be made any more: the metrics listener is opened before.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

import qat_server
import qat_shared
from qat_server import logs
from qat_shared import confinement
from qat_shared.confinement import (
    MAKE_DIR,
    MAKE_REG,
    MAKE_SOCK,
    MAKE_SYM,
    READ,
    REMOVE_DIR,
    REMOVE_FILE,
    TRUNCATE,
    WRITE_FILE,
    nearest,
)
from qat_shared.seccomp import read_profile

log = logs.get(__name__)

PROFILE: Final = Path(__file__).with_name("seccomp.json")
_SYSFS: Final = ("bus", "class", "devices", "kernel/iommu_groups", "module")
_SYSTEM: Final = (
    "/sys/devices/system/cpu",
    *("/proc/self", "/proc/stat", "/proc/meminfo", "/proc/sys/net/core/somaxconn"),  # gRPC's and the metrics'
    *("/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo"),
)
_SOCKETS: Final = READ | WRITE_FILE | MAKE_SOCK | MAKE_REG | MAKE_DIR | REMOVE_FILE | REMOVE_DIR
_LOG_FILES: Final = READ | WRITE_FILE | MAKE_REG | MAKE_SYM | REMOVE_FILE | TRUNCATE


class IncompleteSandboxError(Exception):
    """A layer of the sandbox is missing, and it was required whole; the text names what is missing."""


class Access(Struct, frozen=True, kw_only=True):
    """The directories that the server works with; None where it has none."""

    sysfs_root: Path
    socket_directory: Path
    lock_directory: Path
    configuration: Path | None = None
    log_directory: Path | None = None


def enter(access: Access, *, required: bool) -> dict[str, str]:
    """Confine this process, which must have one thread. Returns what is missing of each layer, "" for nothing.

    Raises IncompleteSandboxError when anything is missing and the sandbox is `required`.
    """
    try:
        # Threads end with its help, and glibc would look for it only then.
        ctypes.CDLL("libgcc_s.so.1")
    except OSError:
        log.v(1, "libgcc_s.so.1 is not there")
    state = confinement.confine(_rules(access), read_profile(PROFILE))
    lacks = confinement.missing(state)
    if lacks and required:
        raise IncompleteSandboxError(f"the sandbox is not whole: {lacks}")
    if lacks:
        log.warning("the sandbox is not whole", missing=lacks)
    else:
        log.info("sandbox entered", layers=tuple(state))
    return state


def _rules(access: Access) -> Iterator[tuple[Path, int]]:
    yield from ((access.sysfs_root / name, READ) for name in _SYSFS)
    yield from ((Path(path), READ) for path in _SYSTEM)
    yield from ((Path(path), READ) for path in _code())
    yield nearest(access.socket_directory), _SOCKETS
    yield nearest(access.lock_directory), READ  # to lock it: one server works on a node
    if access.configuration is not None:
        yield nearest(access.configuration), READ
    if access.log_directory is not None:
        yield access.log_directory, _LOG_FILES


def _code() -> set[str]:
    """Where Python, the libraries and this program are: what is imported late is read late."""
    ours = (os.path.dirname(os.path.dirname(package.__file__ or "")) for package in (qat_server, qat_shared))
    return {os.path.realpath(path) for path in (*sys.path, sys.prefix, sys.base_prefix, *ours) if path}
