"""A sysfs tree of plain files and links in the kernel's layout, for tests of what only reads it."""

import os
import shutil
from pathlib import Path

from qat_shared.pci import PciAddress


def address(text: str) -> PciAddress:
    """6b:00.1 in domain 0000, or with its domain."""
    return PciAddress.parse(text if text.count(":") == 2 else f"0000:{text}")


class SysfsTree:
    """Devices are named by their address as text, with or without the domain. Call the methods in any order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("bus/pci/devices", "bus/pci/drivers", "devices", "kernel/iommu_groups"):
            (root / folder).mkdir(parents=True)

    def device(self, name: str, device_id: int, driver: str | None = None, **attributes: str | None) -> None:
        """Add a device. Attributes by name (numa_node="1"); None leaves one out."""
        where = self.path(name)
        where.mkdir(parents=True)
        (self.root / "bus/pci/devices" / where.name).symlink_to(f"../../../devices/{where.parent.name}/{where.name}")
        defaults = {"vendor": "0x8086", "device": f"0x{device_id:04x}", "numa_node": "0", "enable": "0"}
        for attribute, text in (defaults | attributes).items():
            if text is not None:
                self.write(name, attribute, f"{text}\n")
        self.bind(name, driver)

    def pf(
        self,
        name: str,
        device_id: int = 0x4940,
        driver: str | None = "4xxx",
        state: str | None = "up",
        services: str | None = "dc",
        **attributes: str | None,
    ) -> None:
        """Add a PF with its qat/ folder."""
        self.device(name, device_id, driver, **{"sriov_totalvfs": "16"} | attributes)
        for attribute, text in (("state", state), ("cfg_services", services)):
            if text is not None:
                self.write(name, f"qat/{attribute}", f"{text}\n")

    def vf(
        self,
        name: str,
        pf: str | None,
        driver: str | None = "4xxxvf",
        device_id: int = 0x4941,
        group: int | None = None,
        **attributes: str | None,
    ) -> None:
        """Add a VF, linked with its PF by the next virtfnN; None is a VF in a VM."""
        self.device(name, device_id, driver, **attributes)
        if group is not None:
            self.group(name, group)
        if pf is not None:
            self.link(name, "physfn", f"../{self.path(pf).name}")
            number = len(list(self.path(pf).glob("virtfn*")))
            self.link(pf, f"virtfn{number}", f"../{self.path(name).name}")

    def path(self, name: str) -> Path:
        """The device's directory."""
        at = address(name)
        return self.root / "devices" / f"pci{at.domain:04x}:{at.bus:02x}" / str(at)

    def write(self, name: str, attribute: str, content: str | bytes) -> None:
        """Make or replace an attribute."""
        file = self.path(name) / attribute
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    def link(self, name: str, link: str, target: str) -> None:
        """Make or replace a link of the device; `target` as the link has it."""
        file = self.path(name) / link
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    def bind(self, name: str, driver: str | None) -> None:
        """Put the device on a driver, or on none."""
        old = self.path(name) / "driver"
        if old.is_symlink():
            (self.root / "bus/pci/drivers" / os.path.basename(old.readlink()) / self.path(name).name).unlink()
            old.unlink()
        if driver is not None:
            folder = self.root / "bus/pci/drivers" / driver
            folder.mkdir(exist_ok=True)
            (folder / self.path(name).name).symlink_to(self.path(name))
            self.link(name, "driver", f"../../../bus/pci/drivers/{driver}")

    def group(self, name: str, group: int, *, noiommu: bool = False) -> None:
        """Put the device into an IOMMU group."""
        folder = self.root / "kernel/iommu_groups" / str(group)
        folder.mkdir(exist_ok=True)
        if noiommu:
            (folder / "name").write_text("vfio-noiommu\n")
        self.link(name, "iommu_group", f"../../../kernel/iommu_groups/{group}")

    def remove(self, name: str) -> None:
        """Take the device out; links of its PF that lead to it stay."""
        self.bind(name, None)
        (self.root / "bus/pci/devices" / self.path(name).name).unlink()
        shutil.rmtree(self.path(name))
