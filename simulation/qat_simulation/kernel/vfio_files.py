"""Devices of the emulated kernel that are open through vfio-pci, each once, as by a DPDK process."""

import contextlib
import errno

from qat_shared.pci import PciAddress
from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.drivers import VfioPci
from qat_simulation.kernel.model import Device, os_error


class OpenVfio:
    """A device that is held open as by a DPDK process. Calling the object is the same as `close`."""

    def __init__(self, files: "VfioFiles", device: Device) -> None:
        self._files = files
        self._device = device

    def close(self) -> None:
        """Close the device; a second call does nothing."""
        self._files.close(self._device, self)

    def __call__(self) -> None:
        self.close()

    def __enter__(self) -> "OpenVfio":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VfioFiles:
    """The open devices of one bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._open: dict[PciAddress, OpenVfio] = {}

    def open(self, device: Device) -> OpenVfio:
        """Open a device; the bus's monitor is held. Raises OSError: ENODEV if not on vfio-pci, EBUSY if open."""
        if not isinstance(device.driver, VfioPci) or not device.linked:
            raise os_error(errno.ENODEV)
        if device.opened:
            raise os_error(errno.EBUSY)
        device.opened = True
        self._bus.refresh(device, "enable", "power/runtime_status")
        handle = self._open[device.address] = OpenVfio(self, device)
        return handle

    def close(self, device: Device, handle: OpenVfio) -> None:
        """Close the device, unless this handle was closed before; operations that wait for this continue."""
        with self._bus.monitor:
            if self._open.get(device.address) is not handle:
                return
            del self._open[device.address]
            device.opened = False
            with contextlib.suppress(FileNotFoundError):  # the tree may have been removed by now
                self._bus.refresh(device, "enable", "power/runtime_status")
            self._bus.monitor.notify_all()
