"""BindDriver and ReleaseDriver: the kernel's steps for changing a VF's driver.

    <device>/driver_override            the only driver that may bind to the device ("\\n": any)
    bus/pci/drivers/<driver>/unbind     unbind the device from its driver
    bus/pci/drivers_probe               make the kernel find a driver for it

Every write is an address or a driver name from a fixed set. Writes that would block are avoided: the kernel's `enable`
shows beforehand whether a process holds a VF open through vfio-pci.
Source: the kernel's Documentation/ABI/testing/sysfs-bus-pci and drivers/base/bus.c.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from qat_helper.errors import PENDING_HEAD, OperationError
from qat_helper.operations.node import Node, Outcome
from qat_helper.operations.writing import write
from qat_helper.policy import deny_foreign
from qat_shared.messages import DPDK_DRIVERS, BindDriver, Bound, ErrorCode, ReleaseDriver
from qat_shared.pci import PciAddress
from qat_shared.sysfs import PciDevice, open_device

SETTLE: Final = 1.0
"""Seconds to wait for the driver link after drivers_probe. The kernel creates it before the write returns."""
_POLL: Final = 0.01
# Devices that vfio-pci refuses since Linux 5.9 (vfio_pci_dev_in_denylist).
_DENYLIST: Final = frozenset({0x0443, 0x19E3, 0x37C9})


def bind_driver(node: Node, request: BindDriver) -> Outcome:
    """Bind a VF to a DPDK driver; on return it is bound. Raises OperationError, SysfsError."""
    wanted = request.driver.value
    with _open_vf(node, request.address) as vf:
        before = vf.driver()
        if before != wanted:
            vf.check_unused(before)
            vf.check_loaded(wanted)
            override = vf.own_override()
            try:
                vf.set_override(wanted)
                vf.unbind(before)
                vf.probe()
                vf.wait_until_bound(wanted)
            except OperationError as error:
                error.message += vf.undo(before, override)
                raise
    return Outcome(Bound(id=request.id, audit=PENDING_HEAD, driver=wanted, changed=before != wanted))


def release_driver(node: Node, request: ReleaseDriver) -> Outcome:
    """Release a VF to whichever driver the kernel chooses. Raises OperationError, SysfsError."""
    with _open_vf(node, request.address) as vf:
        before = vf.driver()
        override = vf.own_override()
        changed = before in DPDK_DRIVERS or override is not None
        if changed:
            vf.check_unused(before)
            try:
                vf.set_override(None)
                if before in DPDK_DRIVERS:
                    vf.unbind(before)
                vf.probe()
            except OperationError as error:
                error.message += vf.undo(before, override)
                raise
        return Outcome(Bound(id=request.id, audit=PENDING_HEAD, driver=vf.driver(), changed=changed))


class _Vf:
    """A VF that policy allows to be bound. Its directory and sysfs' root are held open."""

    def __init__(self, root: int, device: PciDevice, kernel_driver: str) -> None:
        self._root = root
        self._device = device
        self._address = str(device.address)
        self._kernel_driver = kernel_driver

    def driver(self) -> str | None:
        """The name of the bound driver, None without one."""
        return self._device.link("driver")

    def own_override(self) -> str | None:
        """The driver_override, None when any driver may bind. Raises OperationError for a foreign one."""
        text = self._device.read_optional("driver_override")
        override = None if text in ("", "(null)") else text
        deny_foreign(self._device.address, override, self._kernel_driver, "reserved (driver_override) for")
        return override

    def check_unused(self, current: str | None) -> None:
        """Check that it can be unbound, without blocking. Raises OperationError."""
        deny_foreign(self._device.address, current, self._kernel_driver)
        if current == "vfio-pci" and self._device.read_optional("enable") != "0":
            raise OperationError(
                ErrorCode.BUSY, f"{self._address} is in use through vfio-pci: try again when its user has exited"
            )

    def check_loaded(self, driver: str) -> None:
        """Raises OperationError when there is no such driver."""
        try:
            os.stat(f"bus/pci/drivers/{driver}", dir_fd=self._root)
        except FileNotFoundError:
            raise OperationError(
                ErrorCode.UNAVAILABLE, f"driver {driver} is not loaded: run modprobe {driver}"
            ) from None

    def wait_until_bound(self, wanted: str) -> None:
        """Wait until it is bound to `wanted`. Raises OperationError: the kernel reports no failed probe."""
        deadline = time.monotonic() + SETTLE
        while (now := self.driver()) != wanted:
            if now is not None or time.monotonic() > deadline:
                raise OperationError(ErrorCode.KERNEL, f"{wanted} did not bind {self._address}: {self._hint(wanted)}")
            time.sleep(_POLL)

    def set_override(self, driver: str | None) -> None:
        """Raises OperationError, as all methods that write do."""
        write(self._device, "driver_override", driver or "\n", "set its driver_override")

    def unbind(self, current: str | None) -> None:
        """Unbind it. The kernel refuses if the driver is no longer `current`."""
        if current is not None:
            name = f"bus/pci/drivers/{current}/unbind"
            write(self._device, name, self._address, f"unbind it from {current}", self._root)

    def probe(self) -> None:
        """Make the kernel find a driver for it."""
        write(self._device, "bus/pci/drivers_probe", self._address, "probe it", self._root)

    def undo(self, driver: str | None, override: str | None) -> str:
        """After a failure: restore the old state as far as possible. Returns text to append to the error message."""
        try:
            self.set_override(override)
            if driver is not None and self.driver() is None:
                self.probe()
        except OperationError as error:
            return f"; and then: {error.message}"
        return ""

    def _hint(self, wanted: str) -> str:
        if wanted == "vfio-pci" and self._device.read_int("device", 16) in _DENYLIST:
            return "load vfio-pci with disable_denylist=1; without that it refuses this device"
        return "see dmesg for the reason (for example, vfio-pci needs an IOMMU)"


@contextmanager
def _open_vf(node: Node, address: PciAddress) -> Iterator[_Vf]:
    """Open a VF that policy allows to be bound. Raises OperationError, SysfsError."""
    with open_device(node.sysfs_root, address) as device:
        kernel_driver = node.policy.check_virtual(device)
        root = os.open(node.sysfs_root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield _Vf(root, device, kernel_driver)
        finally:
            os.close(root)
