"""The helper's self-confinement before it serves: group, inherited descriptors, files, system calls.

    read    <sysfs>/devices, bus/pci, kernel/debug
    write   <sysfs>/devices/.../<parent of each QAT device present at start>, bus/pci/drivers, bus/pci/drivers_probe
    create  a directory in the kubelet's two plugin directories; log files next to the audit log
    remove  its own socket; log files next to the audit log

Paths that are only looked up (stat, readlink, connect) need no right. Children inherit the sandbox through fork.
"""

import array  # noqa: F401  (socket.send_fds imports it on first use, when the sandbox forbids that)
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
from qat_shared.devices import is_qat
from qat_shared.pci import PciAddress
from qat_shared.seccomp import read_profile
from qat_shared.sysfs import SysfsError, open_device

PROFILE: Final = Path(__file__).with_name("seccomp.json")
_HOST_BRIDGE: Final = re.compile(r"/pci[0-9a-f]{4,}:[0-9a-f]{2}/", re.ASCII)


def close_inherited() -> None:
    """Close all descriptors except the standard ones and those that systemd passed to this process."""
    first = FIRST_PASSED
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and (number := os.environ.get("LISTEN_FDS", "")).isdigit():
        first += int(number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= first:
            with suppress(OSError):  # the descriptor of this listing itself
                os.close(int(name))


def join_group(gid: int) -> None:
    """Switch to the server's group only, if permitted. Otherwise the operations that need the group report it."""
    with suppress(PermissionError):
        os.setgroups([])
        os.setresgid(gid, gid, gid)


def confine(sysfs: Path, kubelet: Path, socket: Path, audit_log: Path, *, traceable: bool) -> dict[str, str]:
    """Apply the sandbox; call it after all files are open and before serving.

    Returns, by layer, why it is missing, "" when it is in place.
    """
    codecs.lookup("unicode_escape")  # for the audit log: the module could not be loaded later
    rules = _rules(sysfs, kubelet, socket, audit_log)
    return confinement.confine(rules, read_profile(PROFILE), traceable=traceable)


def _rules(sysfs: Path, kubelet: Path, socket: Path, audit_log: Path) -> Iterator[tuple[Path, int]]:
    yield from ((sysfs / name, READ) for name in ("devices", "bus/pci", "kernel/debug"))
    yield from ((place, WRITE_FILE) for place in _device_places(sysfs))
    yield from ((sysfs / "bus/pci" / name, WRITE_FILE) for name in ("drivers", "drivers_probe"))
    yield from ((nearest(kubelet / name), READ_DIR | MAKE_DIR) for name in ("device-plugins", "plugins_registry"))
    yield socket.parent, REMOVE_FILE
    yield audit_log.parent, READ | WRITE_FILE | MAKE_REG | REMOVE_FILE


def _device_places(sysfs: Path) -> set[Path]:
    """The directories that have the QAT devices present now: a rule needs its path to exist.

    A PF's VFs come and go in the PF's own parent directory (the kernel's pci_iov_add_virtfn).
    """
    found = set()
    for name in os.listdir(sysfs / "bus/pci/devices"):
        # Not an address, or removed in the meantime.
        with suppress(ValueError, SysfsError), open_device(sysfs, PciAddress.parse(name)) as device:
            ids = device.read_int("vendor", 16), device.read_int("device", 16)
            if is_qat(*ids) and _HOST_BRIDGE.search(device.place):
                found.add(Path(device.place).parent)
    return found
