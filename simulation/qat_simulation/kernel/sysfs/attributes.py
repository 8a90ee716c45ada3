"""What each attribute of a PCI device shows, and which a device has. After pci-sysfs.c, iov.c and adf_sysfs.c.

A change of state is followed by `refresh` of the attributes that show it: nothing else writes them.
"""

from collections.abc import Callable
from typing import Final

from msgspec import Struct

from qat_simulation.kernel.model import Device, Qat, Sriov
from qat_simulation.kernel.sysfs.tree import Entry, Tree

NUM_RPS: Final = 64


class Attribute(Struct, frozen=True):
    """Its mode, and its text (None: it cannot be read)."""

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
"""VFs come and go with their PF only (pci_dev_hp_attrs_are_visible)."""


def _first(sriov: Sriov) -> int:
    pf, vf = sriov.pf.pci_address, sriov.pf.vf_address(0)
    return ((vf.bus - pf.bus) << 8) + ((vf.device - pf.device) << 3) + vf.function - pf.function


def entries(device: Device) -> list[Entry]:
    """The files of a new device. qat/ comes with its driver."""
    table = COMMON if device.sriov is None else COMMON | SRIOV
    device.shown.clear()
    return [
        (name, attribute.show(device) if attribute.show else "", attribute.mode)
        for name, attribute in table.items()
        if device.physfn is None or name not in NOT_ON_VFS
    ]


def refresh(tree: Tree, device: Device, *names: str) -> None:
    """Show the device's state as it is now in these attributes."""
    for name in names:
        attribute = ALL[name]
        if attribute.show is None:
            continue
        text, before = attribute.show(device), device.shown.get(name, "")
        if text == before:
            continue
        if len(text) == len(before) == len("0\n"):
            tree.overwrite(f"{device.path}/{name}", text)
        else:
            tree.put(f"{device.path}/{name}", text, attribute.mode)
        device.shown[name] = text
