"""The real kernel with the methods of the emulated one, so that what runs on one runs on the other.

A node's description (qat_simulation.node) becomes the parameter of the module fake_qat; what is done by hand is done as
a person does it, by writing into /sys; what only hardware can do, by the module's switches.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from kernel.vfio_client import VfioUser
from qat_shared.pci import PciAddress
from qat_simulation.kernel.kernel import DeviceState
from qat_simulation.node.description import Node, Pf

SYSFS: Final = Path("/sys")
PCI: Final = SYSFS / "bus/pci"
SWITCHES: Final = SYSFS / "kernel/debug/fake_qat"
_MODULES: Final = {"vfio-pci": "vfio-pci", "igb_uio": "igb_uio"}

Address = PciAddress | str


class RealKernel:
    """Made by `real_kernel`. Methods raise OSError with the kernel's errno, and wait as a shell would."""

    sysfs_root = SYSFS
    uevents_path = Path("/nowhere")  # the kernel's own uevents come by netlink

    def __init__(self, node: Node) -> None:
        self.defects: list[str] = []
        self.node = node

    def load(self, fake_iommu: bool = False) -> None:
        """Load the drivers and the devices of the description, in the state that it says."""
        for name in self.node.drivers:
            self.add_driver(name)
        other = [(each.address, each.vendor, each.device, 0, each.numa_node) for each in self.node.others]
        lone = [(each.address, "8086", each.device, 0, each.numa_node) for each in self.node.vfs]
        texts = [_device(pf.address, "8086", pf.device, pf.total_vfs, pf.numa_node) for pf in self.node.pfs]
        texts += [_device(*each) for each in lone + other]
        bars = int("igb_uio" in self.node.drivers[:1])  # igb_uio takes no device without
        modprobe("fake_qat", f"devices={','.join(texts)}", f"fake_iommu={int(fake_iommu)}", f"bars={bars}")
        for pf in self.node.pfs:
            self._bring_to(pf)
        for vf in self.node.vfs:
            self._place(vf.address, vf.driver)

    def unload(self) -> None:
        """Remove the devices, as if they had never been there."""
        modprobe("-r", "fake_qat")

    def spawn(self, argv: Sequence[str], **popen: Any) -> "subprocess.Popen[Any]":
        """Start a program: on the real kernel there is nothing to it."""
        return subprocess.Popen(argv, **popen)

    def write(self, path: str, data: bytes | str) -> int:
        """write(2) on an attribute, relative to /sys: the number of bytes taken."""
        data = data.encode() if isinstance(data, str) else data
        descriptor = os.open(SYSFS / path, os.O_WRONLY)
        try:
            return os.write(descriptor, data)
        finally:
            os.close(descriptor)

    def bind(self, address: Address, driver: str) -> None:
        self.write(f"bus/pci/drivers/{driver}/bind", f"{address}\n")

    def unbind(self, address: Address) -> None:
        driver = self.driver(address)
        if driver is None:
            raise OSError(19, os.strerror(19))
        self.write(f"bus/pci/drivers/{driver}/unbind", f"{address}\n")

    def set_driver_override(self, address: Address, driver: str | None) -> None:
        self._attribute(address, "driver_override", driver or "")

    def probe(self, address: Address) -> None:
        self.write("bus/pci/drivers_probe", f"{address}\n")

    def remove(self, address: Address) -> None:
        self._attribute(address, "remove", "1")

    def unplug(self, address: Address) -> None:
        """The device is pulled out. Not a VF of a PF: the kernel has no way for that."""
        self.switch(address, "present", 0)

    def plug(self, address: Address) -> None:
        """Put in again what was pulled out; a rescan finds it."""
        self.switch(address, "present", 1)

    def rescan(self) -> None:
        self.write("bus/pci/rescan", "1\n")

    def add_pf(self, pf: Pf) -> None:
        """Plug in a device, in the state that its description says."""
        (SWITCHES / "add").write_text(_device(pf.address, "8086", pf.device, pf.total_vfs, pf.numa_node))
        self._bring_to(pf)

    def set_numvfs(self, address: Address, number: int) -> None:
        self._attribute(address, "sriov_numvfs", str(number))

    def set_state(self, address: Address, state: Literal["up", "down"]) -> None:
        self._attribute(address, "qat/state", state)

    def set_services(self, address: Address, services: str) -> None:
        self._attribute(address, "qat/cfg_services", services)

    def set_heartbeat(self, address: Address, status: Literal[0, -1]) -> None:
        self.switch(address, "heartbeat", status)

    def switch(self, address: Address, name: str, value: int) -> None:
        """Throw a switch of the test module (module/debugfs.c)."""
        (SWITCHES / str(address) / name).write_text(str(value))

    def add_driver(self, name: str) -> None:
        modprobe(_MODULES[name])

    def remove_driver(self, name: str) -> None:
        modprobe("-r", _MODULES[name])

    def open_vfio(self, address: Address) -> "OpenVf":
        """Open a device as a DPDK process does; in this process."""
        return OpenVf(VfioUser(str(address)))

    def driver(self, address: Address) -> str | None:
        """The driver that a device's link shows. Raises FileNotFoundError without such a device."""
        device = PCI / "devices" / str(address)
        device.stat()
        try:
            return (device / "driver").readlink().name
        except FileNotFoundError:
            return None

    def snapshot(self) -> dict[PciAddress, DeviceState]:
        """The module's devices and their VFs, in address order."""
        found = {}
        for device in sorted((PCI / "devices").iterdir(), key=lambda path: PciAddress.parse(path.name)):
            if (PCI / "devices" / device.name).readlink().parts[4] not in self._roots():
                continue
            override = (device / "driver_override").read_text().strip()
            found[PciAddress.parse(device.name)] = DeviceState(
                driver=self.driver(device.name),
                override=None if override == "(null)" else override,
                pf=PciAddress.parse((device / "physfn").readlink().name) if (device / "physfn").is_symlink() else None,
                iommu_group=int((device / "iommu_group").readlink().name)
                if (device / "iommu_group").exists()
                else None,
                opened=self.driver(device.name) == "vfio-pci" and (device / "enable").read_text() == "1\n",
            )
        return found

    def _roots(self) -> set[str]:
        return {f"pci{switches.name[:7]}" for switches in SWITCHES.iterdir() if switches.is_dir()}

    def _attribute(self, address: Address, name: str, text: str) -> None:
        self.write(f"bus/pci/devices/{address}/{name}", f"{text}\n")

    def _bring_to(self, pf: Pf) -> None:
        services = PCI / "devices" / pf.address / "qat/cfg_services"
        if pf.services and pf.has_qat_attributes and pf.services != services.read_text().strip():
            self.set_state(pf.address, "down")
            self.set_services(pf.address, pf.services)
        if pf.has_qat_attributes:
            self.set_state(pf.address, pf.state)
        if pf.auto_reset:
            self._attribute(pf.address, "qat/auto_reset", "on")
        if pf.heartbeat:
            self.set_heartbeat(pf.address, pf.heartbeat)
        if pf.enabled_vfs:
            self.set_numvfs(pf.address, pf.enabled_vfs)
            for number in range(pf.total_vfs):
                self._place(str(pf.vf_address(number)), pf.vf_driver)

    def _place(self, address: str, driver: str | None) -> None:
        """Give a VF to a driver; None: it is where the kernel has put it, "": to none."""
        if driver is None:
            return
        if self.driver(address) is not None:
            self.unbind(address)
        if driver:
            self.set_driver_override(address, driver)
            self.probe(address)
            assert self.driver(address) == driver


class OpenVf:
    """A VF held open, as simulation's OpenVfio."""

    def __init__(self, user: VfioUser) -> None:
        self._user = user

    def close(self) -> None:
        self._user.close()

    def __enter__(self) -> "OpenVf":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def modprobe(*words: str) -> None:
    """Raises AssertionError with what it said."""
    deadline = time.monotonic() + 60
    while (done := subprocess.run(["modprobe", *words], capture_output=True, text=True, check=False)).returncode:
        # In use for a moment longer: a descriptor is closed by the kernel after its process has gone.
        assert "in use" in done.stderr, done.stderr
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.05)


@contextmanager
def vfio_unloaded() -> Iterator[None]:
    """Without vfio and its drivers, for a block that loads them as it wants them; as they were after it."""
    _unload_vfio()
    try:
        yield
    finally:
        _unload_vfio()
        modprobe("vfio-pci", "disable_denylist=1")  # as the script guest/run
        modprobe("vfio_iommu_type1")


def _unload_vfio() -> None:
    for name in ("vfio_pci", "vfio_pci_core", "vfio_iommu_type1", "vfio_virqfd", "vfio"):
        if Path(f"/sys/module/{name}").exists():
            subprocess.run(["rmmod", name], check=True)


def _device(address: str, vendor: str, device: str, vfs: int, numa_node: int | None) -> str:
    domain, bus, _ = address.split(":")
    return f"{domain}:{bus}:{vendor}:{device}:{vfs}:{-1 if numa_node is None else numa_node}"


@contextmanager
def real_kernel(node: Node, fake_iommu: bool = False) -> Iterator[RealKernel]:
    """The devices of a description, while the block runs."""
    kernel = RealKernel(node)
    try:
        kernel.load(fake_iommu)
        yield kernel
    finally:
        with contextlib.suppress(FileNotFoundError):
            kernel.unload()
