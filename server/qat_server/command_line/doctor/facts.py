"""What doctor looks at: one reading of the node, with nothing concluded from it. Only reads; judging is checks.py's.

What cannot be read is absent (None, empty), since doctor runs as whoever calls it, in a pod or on the node.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from qat_server.binding.apparmor import AppArmor, read_apparmor, read_text
from qat_server.devices.pci_bus import PF_DRIVERS, VF_DRIVERS, pci_addresses
from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL
from qat_shared.messages import DPDK_DRIVERS
from qat_shared.pci import PciAddress
from qat_shared.sysfs import PciDevice, SysfsError, open_device

_DRIVERS: Final = PF_DRIVERS | VF_DRIVERS | frozenset(DPDK_DRIVERS)


class Function(Struct, frozen=True):
    """A QAT PF or VF by its id, whatever it is bound to. `num_vfs`, `total_vfs`: of a PF, as SR-IOV has them."""

    address: PciAddress
    device_id: int
    driver: str | None
    iommu_group: int | None
    num_vfs: int = 0
    total_vfs: int = 0

    @property
    def physical(self) -> bool:
        """Whether it is a PF."""
        return self.device_id in PHYSICAL


DEAD: Final = "its firmware does not answer"
"""In place of a reason why a heartbeat cannot be read: it was, and says this."""


class Helper(Struct, frozen=True):
    """The helper as this process meets it. `error` is "" when it answers; heartbeats: PF to "" or to why not."""

    error: str = "not asked"
    version: str = ""
    operations: tuple[str, ...] = ()
    heartbeats: dict[PciAddress, str] = {}


class Facts(Struct, frozen=True, kw_only=True):
    """One reading. `groups`: IOMMU group to its devices. `modules`: parameter files of vfio's modules, by path.

    `kubelet_roots`: the --root-dir of each kubelet that can be seen running. `plugin_directory`: what the kubelet's
    directory for sockets is to us ("", "missing", "closed": not for us to look into, or "open"). `refused`: VFs that a
    running server says could not be bound, since the kernel did not permit the helper's write.
    """

    functions: tuple[Function, ...] = ()
    problems: tuple[str, ...] = ()
    drivers: frozenset[str] = frozenset()
    groups: dict[int, tuple[str, ...]] = {}
    kernel: tuple[int, int] = (0, 0)
    command_line: str = ""
    denylist_disabled: bool | None = None
    noiommu: bool | None = None
    vfio_device: bool = False
    apparmor: AppArmor = AppArmor()
    selinux_enforcing: bool | None = None
    kubelet_roots: tuple[str, ...] = ()
    plugin_directory: str = ""
    helper: Helper = Helper()
    refused: tuple[str, ...] = ()


def read_facts(sysfs: Path, proc: Path, dev: Path, plugin_directory: Path, helper: Helper) -> Facts:
    """Look at the node. Raises SysfsError when `sysfs` has no PCI bus."""
    functions, problems = [], []
    for address in pci_addresses(sysfs):
        try:
            with open_device(sysfs, address) as device:
                if (function := _function(device)) is not None:
                    functions.append(function)
        except (SysfsError, OSError) as error:
            problems.append(str(error))
    return Facts(
        functions=tuple(functions),
        problems=tuple(problems),
        drivers=frozenset(_names(sysfs / "bus/pci/drivers")) & _DRIVERS,
        groups={
            int(name): tuple(sorted(_names(sysfs / "kernel/iommu_groups" / name / "devices")))
            for name in _names(sysfs / "kernel/iommu_groups")
            if name.isdecimal()
        },
        kernel=_release(read_text(proc / "sys/kernel/osrelease") or os.uname().release),
        command_line=read_text(proc / "cmdline"),
        denylist_disabled=_switch(sysfs / "module/vfio_pci/parameters/disable_denylist"),
        noiommu=_switch(sysfs / "module/vfio/parameters/enable_unsafe_noiommu_mode"),
        vfio_device=(dev / "vfio/vfio").exists(),
        apparmor=read_apparmor(sysfs, proc),
        selinux_enforcing=_switch(sysfs / "fs/selinux/enforce"),
        kubelet_roots=tuple(sorted(set(_kubelet_roots(proc)))),
        plugin_directory=_state(plugin_directory),
        helper=helper,
    )


def _function(device: PciDevice) -> Function | None:
    number = device.read_int("device", 16)
    if device.read_int("vendor", 16) != VENDOR_INTEL or (number not in PHYSICAL and number not in VIRTUAL):
        return None
    group = device.link("iommu_group")
    return Function(
        address=device.address,
        device_id=number,
        driver=device.link("driver"),
        iommu_group=int(group) if group is not None and group.isdecimal() else None,
        num_vfs=int(device.read_optional("sriov_numvfs") or 0),
        total_vfs=int(device.read_optional("sriov_totalvfs") or 0),
    )


def _kubelet_roots(proc: Path) -> Iterator[str]:
    """Of the processes that are called kubelet and can be seen; /var/lib/kubelet is the kubelet's default."""
    for name in _names(proc):
        if not name.isdecimal() or read_text(proc / name / "comm") != "kubelet":
            continue
        words = read_text(proc / name / "cmdline").split("\0")
        root = "/var/lib/kubelet"
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word.lstrip("-").startswith("root-dir="):
                root = word.partition("=")[2]
            elif word.lstrip("-") == "root-dir" and word.startswith("-"):
                root = following
        yield root


def _state(directory: Path) -> str:
    try:
        directory.stat()
    except PermissionError:
        return "closed"
    except OSError:
        return "missing"
    return "open" if os.access(directory, os.W_OK | os.X_OK) else "closed"


def _release(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text, re.ASCII)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _switch(path: Path) -> bool | None:
    text = read_text(path)
    return text in ("Y", "y", "1") if text else None


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
