"""A helper on a tree that an attacker changes, and a list of possible replacements.

In addition to the emulated kernel's tree there are a copy of it, another device, and another directory with the
device's name: none of them may ever be written to. Every write(2) of the helper is traced (writes.py).
"""

import ctypes
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helper_security.chain import interrupted, verified
from helper_security.writes import Write, Writes
from qat_shared.messages import AnyReply, BindDriver, DpdkDriver, ReleaseDriver
from qat_shared.pci import PciAddress
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import Node, OtherDevice, Pf
from support.conditions import wait_until
from support.emulated_kernel import PF, VF, emulated
from support.helper_process import COMMAND, Client, helper_options

ADDRESS = PciAddress.parse(VF)
NIC = "0000:00:07.0"
NODE = Node(
    pfs=(Pf(address=PF, device="4940", services="dc", total_vfs=2),),
    others=(OtherDevice(address=NIC, vendor="8086", device="1572", driver="vfio-pci"),),
)
DEVICE = f"devices/pci0000:6b/{VF}"
DRIVERS = "bus/pci/drivers"
# What is replaced by a link, and the link's target; None: the same path in a copy of the whole tree.
SWAPS: dict[str, tuple[str, str | None]] = {
    "the device's link to a copy of it elsewhere": (f"bus/pci/devices/{VF}", None),
    "the device's link to another device": (f"bus/pci/devices/{VF}", f"../../../devices/pci0000:00/{NIC}"),
    "the device's link to another with its name": (f"bus/pci/devices/{VF}", f"../../../devices/pci0000:00/{VF}"),
    "the device's directory": (DEVICE, None),
    "its root bus": ("devices/pci0000:6b", None),
    "its override": (f"{DEVICE}/driver_override", None),
    "its override to another device's": (f"{DEVICE}/driver_override", f"../../pci0000:00/{NIC}/driver_override"),
    "its driver to a stranger": (f"{DEVICE}/driver", f"../../../{DRIVERS}/nvme"),
    "its driver to the one wanted": (f"{DEVICE}/driver", f"../../../{DRIVERS}/./vfio-pci"),
    "its driver to a name with a path": (f"{DEVICE}/driver", "../../../../../etc/passwd"),
    "vfio-pci": (f"{DRIVERS}/vfio-pci", None),
    "its kernel driver": (f"{DRIVERS}/4xxxvf", None),
    "its kernel driver to another": (f"{DRIVERS}/4xxxvf", "vfio-pci"),
    "unbind": (f"{DRIVERS}/4xxxvf/unbind", None),
    "unbind to bind": (f"{DRIVERS}/4xxxvf/unbind", "bind"),
    "drivers_probe": ("bus/pci/drivers_probe", None),
    "drivers_probe to rescan": ("bus/pci/drivers_probe", "rescan"),
    "all drivers": (DRIVERS, None),
    "the bus": ("bus/pci", None),
    "all buses": ("bus", None),
}


class Attacked:
    """A helper on a tree that an attacker can change, and a copy of the tree that must never be written to."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.root = kernel.sysfs_root
        self.run = self.root.parent / "run"
        self.run.mkdir()
        self.outside = self.run / "outside"
        shutil.copytree(self.root, self.outside, symlinks=True)
        shutil.copytree(self.root / f"devices/pci0000:00/{NIC}", self.root / f"devices/pci0000:00/{VF}", symlinks=True)
        self.parked = kernel.roots[1] / "parked"
        self.audit = self.run / "audit.jsonl"
        self.checked = 0
        self.writes = Writes(kernel, self.run)
        options = helper_options(self.root, self.run, self.run / "h.sock", self.audit)
        with (self.run / "log").open("ab") as log:
            self.process = self.writes.spawn([COMMAND, *options], stderr=log)
        wait_until(lambda: b"serving on" in (self.run / "log").read_bytes())
        self.client = Client(self.run / "h.sock")

    def bind(self, driver: DpdkDriver = DpdkDriver.VFIO_PCI) -> AnyReply:
        return self.client.ask(BindDriver(id=1, address=ADDRESS, driver=driver))

    def release(self) -> AnyReply:
        return self.client.ask(ReleaseDriver(id=2, address=ADDRESS))

    def swap(self, kind: str) -> None:
        """Exchange the real thing and the link in one step."""
        place, target = SWAPS[kind]
        self.parked.symlink_to(target or self.outside / place)
        exchange(self.root / place, self.parked)

    def swap_back(self, kind: str) -> None:
        """Undo the exchange, unless the kernel has recreated or removed the thing in the meantime."""
        place, target = SWAPS[kind]
        path = self.root / place
        if path.is_symlink() and os.readlink(path) == str(target or self.outside / place):
            exchange(path, self.parked)
        self.parked.unlink()

    def sysfs_writes(self) -> list[Write]:
        """The writes other than those to the audit log and standard error."""
        return [write for write in self.writes.seen if write[0] not in (str(self.audit), str(self.run / "log"))]

    def check(self) -> None:
        """Check that no write since the last check was outside the table."""
        allowed = {
            f"{self.root}/{DEVICE}/driver_override": {b"vfio-pci", b"igb_uio", b"\n"},
            f"{self.root}/{DRIVERS}/4xxxvf/unbind": {VF.encode()},
            f"{self.root}/{DRIVERS}/vfio-pci/unbind": {VF.encode()},
            f"{self.root}/{DRIVERS}/igb_uio/unbind": {VF.encode()},
            f"{self.root}/bus/pci/drivers_probe": {VF.encode()},
        }
        for path, data in self.sysfs_writes()[self.checked :]:
            self.checked += 1
            assert any(data in allowed.get(place, ()) for place in self.places(path)), (path, data)
        assert self.kernel.snapshot()[PciAddress.parse(NIC)].driver == "vfio-pci", "a foreign device is unchanged"
        assert self.process.poll() is None

    def places(self, path: str) -> list[str]:
        """The path in the original tree; for something set aside, the path that it may have come from."""
        aside = path.removeprefix(str(self.parked))
        if aside != path:
            return [f"{self.root}/{place}{aside}" for place, _ in SWAPS.values()]
        removed = re.sub(rf"^{self.kernel.roots[1]}/[0-9]+/", f"{self.root}/{DEVICE}/", path)  # a VF that was removed
        return [removed]


def exchange(one: Path, other: Path) -> None:
    """Exchange two names in one step (renameat2, RENAME_EXCHANGE)."""
    if ctypes.CDLL(None, use_errno=True).renameat2(-100, bytes(one), -100, bytes(other), 2) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one))


@contextmanager
def attacked() -> Iterator[Attacked]:
    with emulated(NODE) as kernel:
        on = Attacked(kernel)
        try:
            yield on
            on.check()
            lines = verified(on.audit)
            assert not interrupted(lines)
        finally:
            on.client.close()
            on.process.kill()
            on.process.wait()
            on.writes.close()
