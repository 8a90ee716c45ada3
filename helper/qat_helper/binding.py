"""BindDriver and ReleaseDriver: the kernel's steps for giving a VF another driver.

    <device>/driver_override            which driver alone may take the device ("\\n": any)
    bus/pci/drivers/<driver>/unbind     take it from its driver
    bus/pci/drivers_probe               offer it to the drivers

What is written is an address or a driver's name from a fixed set. No write is made that would block: the kernel's
`enable` tells beforehand whether a process holds a VF open through vfio-pci.
Source: the kernel's Documentation/ABI/testing/sysfs-bus-pci and drivers/base/bus.c.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from qat_helper.errors import UNSIGNED, OperationError
from qat_helper.node import Node, Outcome
from qat_helper.policy import check_own_driver
from qat_helper.writing import write
from qat_shared.messages import DPDK_DRIVERS, BindDriver, Bound, ErrorCode, ReleaseDriver
from qat_shared.pci import PciAddress
from qat_shared.sysfs import PciDevice, open_device

SETTLE: Final = 1.0
"""Seconds for the driver's link to show after drivers_probe. The kernel has it there before the write returns."""
_POLL: Final = 0.01
# Devices that vfio-pci refuses since Linux 5.9 (vfio_pci_dev_in_denylist).
_DENYLIST: Final = frozenset({0x0443, 0x19E3, 0x37C9})


def bind_driver(node: Node, request: BindDriver) -> Outcome:
    """Bind a VF to a DPDK driver; it is bound when this returns. Raises OperationError, SysfsError."""
    wanted = request.driver.value
    with _hold(node, request.address) as vf:
        before = vf.driver()
        if before != wanted:
            vf.check_free(before)
            vf.check_loaded(wanted)
            override = vf.own_override()
            try:
                vf.set_override(wanted)
                vf.unbind(before)
                vf.probe()
                vf.check_taken(wanted)
            except OperationError as error:
                error.message += vf.undo(before, override)
                raise
    return Outcome(Bound(id=request.id, audit=UNSIGNED, driver=wanted, changed=before != wanted))


def release_driver(node: Node, request: ReleaseDriver) -> Outcome:
    """Give a VF to whichever driver the kernel chooses. Raises OperationError, SysfsError."""
    with _hold(node, request.address) as vf:
        before = vf.driver()
        override = vf.own_override()
        changed = before in DPDK_DRIVERS or override is not None
        if changed:
            vf.check_free(before)
            try:
                vf.set_override(None)
                if before in DPDK_DRIVERS:
                    vf.unbind(before)
                vf.probe()
            except OperationError as error:
                error.message += vf.undo(before, override)
                raise
        return Outcome(Bound(id=request.id, audit=UNSIGNED, driver=vf.driver(), changed=changed))


class _Vf:
    """A VF that policy allows to be bound, while its directory and sysfs' root are held open."""

    def __init__(self, root: int, device: PciDevice, kernel_driver: str | None) -> None:
        self._root = root
        self._device = device
        self._address = str(device.address)
        self._kernel_driver = kernel_driver

    def driver(self) -> str | None:
        """The driver that it is bound to."""
        return self._device.link("driver")

    def own_override(self) -> str | None:
        """The driver that alone may take it, None when any may. Raises OperationError when somebody else said so."""
        text = self._device.read_optional("driver_override")
        override = None if text in ("", "(null)") else text
        check_own_driver(self._device.address, override, self._kernel_driver, "meant (driver_override) for")
        return override

    def check_free(self, current: str | None) -> None:
        """It may be taken from its driver, and that will not block. Raises OperationError."""
        check_own_driver(self._device.address, current, self._kernel_driver)
        if current == "vfio-pci" and self._device.read_optional("enable") != "0":
            raise OperationError(
                ErrorCode.BUSY, f"{self._address} is held open through vfio-pci: try again when its user has ended"
            )

    def check_loaded(self, driver: str) -> None:
        """Raises OperationError when there is no such driver."""
        try:
            os.stat(f"bus/pci/drivers/{driver}", dir_fd=self._root)
        except FileNotFoundError:
            raise OperationError(
                ErrorCode.UNAVAILABLE, f"driver {driver} is not there: load its module (modprobe {driver})"
            ) from None

    def check_taken(self, wanted: str) -> None:
        """Wait until it is bound to `wanted`. Raises OperationError: the kernel says nothing of a probe that failed."""
        deadline = time.monotonic() + SETTLE
        while (now := self.driver()) != wanted:
            if now is not None or time.monotonic() > deadline:
                raise OperationError(ErrorCode.KERNEL, f"{wanted} did not take {self._address}: {self._hint(wanted)}")
            time.sleep(_POLL)

    def set_override(self, driver: str | None) -> None:
        """Raises OperationError, as all that write do."""
        write(self._device, "driver_override", driver or "\n", "set its driver_override")

    def unbind(self, current: str | None) -> None:
        """Take it from its driver. The kernel refuses when that is no longer `current`."""
        if current is not None:
            name = f"bus/pci/drivers/{current}/unbind"
            write(self._device, name, self._address, f"unbind it from {current}", self._root)

    def probe(self) -> None:
        """Offer it to the drivers."""
        write(self._device, "bus/pci/drivers_probe", self._address, "probe it", self._root)

    def undo(self, driver: str | None, override: str | None) -> str:
        """After a failure: back to how it was, as far as that can be done. What to add to the failure's sentence."""
        try:
            self.set_override(override)
            if driver is not None and self.driver() is None:
                self.probe()
        except OperationError as error:
            return f"; and then: {error.message}"
        return ""

    def _hint(self, wanted: str) -> str:
        if wanted == "vfio-pci" and self._device.read_int("device", 16) in _DENYLIST:
            return "load the module vfio-pci with disable_denylist=1, since it refuses this device otherwise"
        return "dmesg says why (without an IOMMU, for one, vfio-pci takes no device)"


@contextmanager
def _hold(node: Node, address: PciAddress) -> Iterator[_Vf]:
    """Raises OperationError, SysfsError."""
    with open_device(node.sysfs_root, address) as device:
        kernel_driver = node.policy.check_virtual(device)
        root = os.open(node.sysfs_root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield _Vf(root, device, kernel_driver)
        finally:
            os.close(root)
