"""What the helper leaves itself before it serves: its group, what it inherited, which files, which system calls.

    read    <sysfs>/devices, bus/pci, kernel/debug
    write   <sysfs>/devices/pciDDDD:BB (each that is there at the start), bus/pci/drivers, bus/pci/drivers_probe
    make    a directory in the kubelet's two plugin directories; log files beside the audit log
    remove  its own socket; log files beside the audit log

Paths that are only looked up (stat, readlink, connect) need no right. The children have the same sandbox: fork is all
that it takes to inherit it.
"""

import array  # noqa: F401  (socket.send_fds imports it when it is too late)
import codecs
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from qat_helper.listening import FIRST_PASSED
from qat_shared import confinement
from qat_shared.confinement import MAKE_DIR, MAKE_REG, READ, READ_DIR, REMOVE_FILE, WRITE_FILE, nearest
from qat_shared.seccomp import read_profile

PROFILE: Final = Path(__file__).with_name("seccomp.json")
_TREE: Final = re.compile(r".*?/pci[0-9a-f]{4,}:[0-9a-f]{2}(?=/)", re.ASCII)


def close_inherited() -> None:
    """Close all descriptors but the standard ones and those that systemd says it has passed to this process."""
    first = FIRST_PASSED
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and (number := os.environ.get("LISTEN_FDS", "")).isdigit():
        first += int(number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= first:
            with suppress(OSError):  # the one by which this was read
                os.close(int(name))


def join_group(gid: int) -> None:
    """Be in the server's group and in no other, if this process may; what needs the group says so without it."""
    with suppress(PermissionError):
        os.setgroups([])
        os.setresgid(gid, gid, gid)


def confine(sysfs: Path, kubelet: Path, socket: Path, audit_log: Path, *, traceable: bool) -> dict[str, str]:
    """Once all is open, before anything is served: by layer, what is missing of it, "" when nothing is."""
    codecs.lookup("unicode_escape")  # the audit log's, of a module that could not be read any more
    rules = _rules(sysfs, kubelet, socket, audit_log)
    return confinement.confine(rules, read_profile(PROFILE), traceable=traceable)


def _rules(sysfs: Path, kubelet: Path, socket: Path, audit_log: Path) -> Iterator[tuple[Path, int]]:
    yield from ((sysfs / name, READ) for name in ("devices", "bus/pci", "kernel/debug"))
    yield from ((tree, WRITE_FILE) for tree in _pci_trees(sysfs))
    yield from ((sysfs / "bus/pci" / name, WRITE_FILE) for name in ("drivers", "drivers_probe"))
    yield from ((nearest(kubelet / name), READ_DIR | MAKE_DIR) for name in ("device-plugins", "plugins_registry"))
    yield socket.parent, REMOVE_FILE
    yield audit_log.parent, READ | WRITE_FILE | MAKE_REG | REMOVE_FILE


def _pci_trees(sysfs: Path) -> set[Path]:
    """The directories of the host bridges, wherever they are: a rule for a path needs the path to be there."""
    devices = sysfs / "bus/pci/devices"
    found = set((sysfs / "devices").glob("pci*"))
    for name in os.listdir(devices):
        with suppress(OSError):  # gone meanwhile
            if match := _TREE.match(os.readlink(devices / name)):
                found.add(devices / match[0])
    return found
