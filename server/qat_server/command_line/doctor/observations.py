"""The state of the node as doctor reads it. This module only reads; checks.py draws the conclusions.

Values that cannot be read are None or empty, since doctor runs as its caller's user, in a pod or on the node.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from qat_server.binding.apparmor import AppArmor, read_apparmor, read_text
from qat_server.devices.pci_bus import PF_DRIVERS, VF_DRIVERS, pci_addresses
from qat_shared.devices import PHYSICAL, is_qat
from qat_shared.messages import DPDK_DRIVERS
from qat_shared.pci import PciAddress
from qat_shared.sysfs import PciDevice, SysfsError, open_device

_DRIVERS: Final = PF_DRIVERS | VF_DRIVERS | frozenset(DPDK_DRIVERS)


class QatFunction(Struct, frozen=True):
    """A PF or VF with a QAT device ID, on any driver. `num_vfs`, `total_vfs`: sriov_numvfs, sriov_totalvfs of a PF."""

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


NO_HEARTBEAT: Final = "its firmware does not answer"
"""The reason when a heartbeat was read and the firmware is dead. All other reasons mean that it could not be read."""


class HelperAnswer(Struct, frozen=True):
    """The helper's answers to doctor. `error` is "" if it answers. `heartbeats`: PF to "", or why there is none."""

    error: str = "not queried"
    version: str = ""
    operations: tuple[str, ...] = ()
    heartbeats: dict[PciAddress, str] = {}


class NodeObservations(Struct, frozen=True, kw_only=True):
    """One reading of the node, and the answers of helper and server.

    `problems`: why devices could not be read. `drivers`: the loaded PCI drivers among those that QAT devices use.
    `groups`: IOMMU group to the names of its devices. `kernel`: major and minor version. `command_line`: the kernel's.
    `denylist_disabled`, `noiommu`: parameters of vfio's modules. `kubelet_roots`: the --root-dir of each visible
    kubelet. `plugin_directory`: access to the server's socket directory: "open" (writable), "closed" (not writable),
    "missing" or "" (unknown). `refused`: VFs whose bind the kernel did not permit, as a running server reports.
    """

    functions: tuple[QatFunction, ...] = ()
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
    helper: HelperAnswer = HelperAnswer()
    refused: tuple[str, ...] = ()


def observe_node(sysfs: Path, proc: Path, dev: Path, plugin_directory: Path) -> NodeObservations:
    """Read the node; `helper` and `refused` keep their defaults. Raises SysfsError if `sysfs` has no PCI bus."""
    functions, problems = [], []
    for address in pci_addresses(sysfs):
        try:
            with open_device(sysfs, address) as device:
                if (function := _function(device)) is not None:
                    functions.append(function)
        except (SysfsError, OSError) as error:
            problems.append(str(error))
    return NodeObservations(
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
        plugin_directory=_access(plugin_directory),
    )


def _function(device: PciDevice) -> QatFunction | None:
    number = device.read_int("device", 16)
    if not is_qat(device.read_int("vendor", 16), number):
        return None
    group = device.link("iommu_group")
    return QatFunction(
        address=device.address,
        device_id=number,
        driver=device.link("driver"),
        iommu_group=int(group) if group is not None and group.isdecimal() else None,
        num_vfs=int(device.read_optional("sriov_numvfs") or 0),
        total_vfs=int(device.read_optional("sriov_totalvfs") or 0),
    )


def _kubelet_roots(proc: Path) -> Iterator[str]:
    """The --root-dir of each visible process named kubelet; /var/lib/kubelet is the kubelet's default."""
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


def _access(directory: Path) -> str:
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
