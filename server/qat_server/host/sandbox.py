"""The sandbox that the server enters before it has threads: the files and system calls that it keeps.

    read    <sysfs>/bus, class, devices, ...; its own code; some of /proc; the time zone; the configuration;
            the directory of the helper's socket, to lock it
    write   <kubelet-dir>/device-plugins/qat.intel.com or plugins_registry/qat.intel.com: the endpoints' sockets;
            the log files' directory, only with --logtostderr=false

A directory that does not exist yet is replaced by its nearest existing ancestor, but for the log files': without their
directory the server does not start.

Inside, only Unix sockets and the socket for the kernel's uevents can be created. The metrics listener is opened before.
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
    """A layer of the sandbox is missing although all are required; the text names it."""


class Access(Struct, frozen=True, kw_only=True):
    """The directories that the server uses, from its Settings (process.py); None for one that it does not use."""

    sysfs_root: Path
    socket_directory: Path
    lock_directory: Path
    configuration: Path | None = None
    log_directory: Path | None = None


def enter(access: Access, *, required: bool) -> dict[str, str]:
    """Confine this process, which must have one thread. Returns the missing part by layer, "" for a complete one.

    Raises IncompleteSandboxError when any part is missing and the sandbox is `required`.
    """
    try:
        # A thread needs it when it ends. glibc would load it only then, inside the sandbox.
        ctypes.CDLL("libgcc_s.so.1")
    except OSError:
        log.v(1, "libgcc_s.so.1 cannot be loaded")
    state = confinement.confine(_rules(access), read_profile(PROFILE))
    lacks = confinement.missing(state)
    if lacks and required:
        raise IncompleteSandboxError(f"the sandbox is incomplete: {lacks}")
    if lacks:
        log.warning("the sandbox is incomplete", missing=lacks)
    else:
        log.info("sandbox entered", layers=tuple(state))
    return state


def _rules(access: Access) -> Iterator[tuple[Path, int]]:
    yield from ((access.sysfs_root / name, READ) for name in _SYSFS)
    yield from ((Path(path), READ) for path in _SYSTEM)
    yield from ((Path(path), READ) for path in _code())
    yield nearest(access.socket_directory), _SOCKETS
    yield nearest(access.lock_directory), READ  # to lock it, so that only one server runs on a node
    if access.configuration is not None:
        yield nearest(access.configuration), READ
    if access.log_directory is not None:
        yield access.log_directory, _LOG_FILES


def _code() -> set[str]:
    """The directories of Python, the libraries and this program, since some modules are imported late."""
    ours = (os.path.dirname(os.path.dirname(package.__file__ or "")) for package in (qat_server, qat_shared))
    return {os.path.realpath(path) for path in (*sys.path, sys.prefix, sys.base_prefix, *ours) if path}
