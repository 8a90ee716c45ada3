"""Who has which device of the emulated kernel open through vfio-pci, as a DPDK process has: one at a time."""

import contextlib
import errno

from qat_shared.pci import PciAddress
from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.drivers import VfioPci
from qat_simulation.kernel.model import Device, failure


class OpenVfio:
    """A device held open as by a DPDK process. `close` lets it go; a call of the object does the same."""

    def __init__(self, files: "VfioFiles", device: Device) -> None:
        self._files = files
        self._device = device

    def close(self) -> None:
        """Close it; nothing happens the second time."""
        self._files.close(self._device, self)

    def __call__(self) -> None:
        self.close()

    def __enter__(self) -> "OpenVfio":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VfioFiles:
    """What is open now, of one bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._open: dict[PciAddress, OpenVfio] = {}

    def open(self, device: Device) -> OpenVfio:
        """The bus's monitor is held. Raises OSError: ENODEV when not on vfio-pci, EBUSY when open."""
        if not isinstance(device.driver, VfioPci) or not device.linked:
            raise failure(errno.ENODEV)
        if device.opened:
            raise failure(errno.EBUSY)
        device.opened = True
        self._bus.refresh(device, "enable", "power/runtime_status")
        handle = self._open[device.address] = OpenVfio(self, device)
        return handle

    def close(self, device: Device, handle: OpenVfio) -> None:
        """Let the device go, unless this handle was closed before; whoever waits for that goes on."""
        with self._bus.monitor:
            if self._open.get(device.address) is not handle:
                return
            del self._open[device.address]
            device.opened = False
            with contextlib.suppress(FileNotFoundError):  # the tree may be gone by now
                self._bus.refresh(device, "enable", "power/runtime_status")
            self._bus.monitor.notify_all()
