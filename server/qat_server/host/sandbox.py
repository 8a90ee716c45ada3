"""What the server leaves itself before it has threads: which files, which system calls.

    read    <sysfs>/bus/pci, devices, ...; its own code; /proc; the time zone; the provisioning configuration
    write   the endpoints' directory; the directory of the log files, where any were asked for

No socket but Unix ones and the kernel's uevents can be made any more: the metrics listener is opened before.
"""

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import qat_server
import qat_shared
from qat_server import logs
from qat_server.command_line.settings import Settings, SettingsError
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


def enter(settings: Settings) -> dict[str, str]:
    """Confine this process, which must have one thread: by layer, what is missing of it. Raises SettingsError."""
    try:
        # Threads end with its help, and glibc would look for it only then.
        ctypes.CDLL("libgcc_s.so.1")
    except OSError:
        log.v(1, "libgcc_s.so.1 is not there")
    state = confinement.confine(_rules(settings), read_profile(PROFILE))
    lacks = confinement.missing(state)
    if lacks and settings.require_sandbox:
        raise SettingsError(f"--require-sandbox: the sandbox is not whole: {lacks}")
    if lacks:
        log.warning("the sandbox is not whole", missing=lacks)
    else:
        log.info("sandbox entered", layers=tuple(state))
    return state


def _rules(settings: Settings) -> Iterator[tuple[Path, int]]:
    yield from ((settings.sysfs_root / name, READ) for name in _SYSFS)
    yield from ((Path(path), READ) for path in _SYSTEM)
    yield from ((Path(path), READ) for path in _code())
    yield nearest(settings.socket_directory), _SOCKETS
    yield nearest(settings.helper_socket.parent), READ  # to lock it: one server works on a node
    if settings.provisioning_config is not None:
        yield nearest(settings.provisioning_config), READ
    logging = settings.logging
    if not logging.to_stderr:
        directory = os.path.dirname(os.path.abspath(logging.file)) if logging.file else logging.directory
        yield Path(directory or tempfile.gettempdir()), _LOG_FILES


def _code() -> set[str]:
    """Where Python, the libraries and this program are: what is imported late is read late."""
    ours = (os.path.dirname(os.path.dirname(package.__file__ or "")) for package in (qat_server, qat_shared))
    return {os.path.realpath(path) for path in (*sys.path, sys.prefix, sys.base_prefix, *ours) if path}
