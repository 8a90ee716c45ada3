"""The attributes of PCI devices: which ones a device has, their text, and how written values are parsed.

After pci-sysfs.c, iov.c and adf_sysfs.c. Whoever changes a device's state calls `refresh` for the attributes that show
it; nothing else writes them.
"""

import errno
import string
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from qat_simulation.kernel.model import Device, Qat, Sriov, os_error
from qat_simulation.kernel.sysfs.tree import Entry, Tree

NUM_RPS: Final = 64


class Attribute(Struct, frozen=True):
    """The file's mode, and the function that makes its text (None: it cannot be read)."""

    mode: int
    show: Callable[[Device], str] | None = None


def _sriov(show: Callable[[Sriov], object]) -> Callable[[Device], str]:
    return lambda device: f"{show(device.sriov)}\n" if device.sriov is not None else ""


def _qat(show: Callable[[Qat], object]) -> Callable[[Device], str]:
    return lambda device: f"{show(device.qat)}\n" if device.qat is not None else ""


COMMON: Final = {
    "vendor": Attribute(0o444, lambda device: f"0x{device.vendor:04x}\n"),
    "device": Attribute(0o444, lambda device: f"0x{device.device_id:04x}\n"),
    "subsystem_vendor": Attribute(0o444, lambda device: f"0x{device.vendor:04x}\n"),
    "subsystem_device": Attribute(0o444, lambda device: "0x0000\n"),
    "class": Attribute(0o444, lambda device: f"0x{device.class_code:06x}\n"),
    "revision": Attribute(0o444, lambda device: "0x40\n"),
    "modalias": Attribute(0o444, lambda device: f"{device.modalias}\n"),
    "numa_node": Attribute(0o644, lambda device: f"{-1 if device.numa_node is None else device.numa_node}\n"),
    "enable": Attribute(0o644, lambda device: f"{int(device.enabled)}\n"),
    "driver_override": Attribute(0o644, lambda device: f"{device.override or '(null)'}\n"),
    "uevent": Attribute(0o644, lambda device: "".join(f"{line}\n" for line in device.uevent_fields)),
    "remove": Attribute(0o200),
    "rescan": Attribute(0o200),
    "power/runtime_status": Attribute(0o444, lambda device: "suspended\n" if device.suspended else "active\n"),
}

SRIOV: Final = {
    "sriov_totalvfs": Attribute(0o444, _sriov(lambda sriov: sriov.pf.total_vfs)),
    "sriov_numvfs": Attribute(0o644, _sriov(lambda sriov: sriov.number)),
    "sriov_drivers_autoprobe": Attribute(0o644, _sriov(lambda sriov: int(sriov.autoprobe))),
    "sriov_offset": Attribute(0o444, _sriov(lambda sriov: sriov.pf.vf_offset or _first(sriov))),
    "sriov_stride": Attribute(0o444, _sriov(lambda sriov: sriov.pf.vf_stride)),
    "sriov_vf_device": Attribute(0o444, _sriov(lambda sriov: f"{sriov.pf.vf_device_id:04x}")),
}

QAT: Final = {
    "qat/state": Attribute(0o644, _qat(lambda qat: "up" if qat.up else "down")),
    "qat/cfg_services": Attribute(0o644, _qat(lambda qat: qat.services)),
    "qat/auto_reset": Attribute(0o644, _qat(lambda qat: "on" if qat.auto_reset else "off")),
    "qat/pm_idle_enabled": Attribute(0o644, _qat(lambda qat: int(bool(qat.pm_idle)))),
    "qat/num_rps": Attribute(0o444, _qat(lambda _: NUM_RPS)),
}

ALL: Final = COMMON | SRIOV | QAT

NOT_ON_VFS: Final = ("remove", "rescan")
"""Attributes that VFs do not have: VFs are added and removed only with their PF (pci_dev_hp_attrs_are_visible)."""


def _first(sriov: Sriov) -> int:
    pf, vf = sriov.pf.pci_address, sriov.pf.vf_address(0)
    return ((vf.bus - pf.bus) << 8) + ((vf.device - pf.device) << 3) + vf.function - pf.function


def entries(device: Device) -> list[Entry]:
    """The files of a new device. qat/ is added by its driver."""
    table = COMMON if device.sriov is None else COMMON | SRIOV
    device.file_texts.clear()
    return [
        (name, attribute.show(device) if attribute.show else "", attribute.mode)
        for name, attribute in table.items()
        if device.physfn is None or name not in NOT_ON_VFS
    ]


def refresh(tree: Tree, device: Device, *names: str) -> None:
    """Write the device's present state to the files of these attributes."""
    for name in names:
        attribute = ALL[name]
        if attribute.show is None:
            continue
        text, before = attribute.show(device), device.file_texts.get(name, "")
        if text == before:
            continue
        if len(text) == len(before) == len("0\n"):
            tree.overwrite(f"{device.path}/{name}", text)
        else:
            tree.put(f"{device.path}/{name}", text, attribute.mode)
        device.file_texts[name] = text


# How written values are parsed; an invalid one is EINVAL.


def line(text: str) -> str:
    """The text without one newline at its end (sysfs_streq)."""
    return text.removesuffix("\n")


def unsigned(text: str, limit: int) -> int:
    """kstrtou*(buf, 0): decimal, 0x, or 0 for octal. Raises OSError (EINVAL), also below 0 and above the limit."""
    digits = line(text).removeprefix("+").lower()
    base = 16 if digits.startswith("0x") else 8 if digits.startswith("0") and len(digits) > 1 else 10
    digits = digits.removeprefix("0x") if base == 16 else digits
    if not digits or not set(digits) <= set(string.hexdigits[:base]):
        raise os_error(errno.EINVAL)
    number = int(digits, base)
    if number > limit:
        raise os_error(errno.EINVAL)
    return number


def boolean(text: str) -> bool:
    """kstrtobool: y, t, 1, on; n, f, 0, off; only the first letters count. Raises OSError (EINVAL)."""
    start = text[:2].lower()
    if start[:1] in ("y", "t", "1") or start == "on":
        return True
    if start[:1] in ("n", "f", "0") or start == "of":
        return False
    raise os_error(errno.EINVAL)
