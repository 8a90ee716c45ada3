"""Faults that a test or a person puts into the emulated kernel: writes that fail, are slow, or never come back.

They concern writes to one attribute (state or qat/state, driver_override, unbind, ...; for bind, unbind and
drivers_probe the device is the one written), of one device or of all. "probe" is the moment when a driver takes one.
"""

import time
from dataclasses import dataclass

from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.model import failure


@dataclass(slots=True)
class _Fault:
    attribute: str
    address: str | None
    errno: int = 0
    times: int = 0
    seconds: float = 0.0
    hangs: bool = False

    def concerns(self, attribute: str, address: str) -> bool:
        same = self.attribute in (attribute, attribute.rpartition("/")[2])
        return same and self.address in (None, address)


class Faults:
    """All faults there are now. Every method is called with the bus's monitor held."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._faults: list[_Fault] = []
        self.hanging = 0
        """Writes that wait until they are released."""

    def fail(self, attribute: str, address: str | None, number: int, times: int) -> None:
        """The next `times` writes fail with this errno, and do nothing."""
        self._faults.append(_Fault(attribute, address, errno=number, times=times))

    def delay(self, attribute: str, address: str | None, seconds: float) -> None:
        """Each write takes so long before it does anything; 0 ends that."""
        self._faults = [
            fault
            for fault in self._faults
            if not (fault.seconds and fault.attribute == attribute and fault.address == address)
        ]
        if seconds > 0:
            self._faults.append(_Fault(attribute, address, seconds=seconds))

    def hang(self, attribute: str, address: str | None) -> None:
        """Writes wait until `release`."""
        self._faults.append(_Fault(attribute, address, hangs=True))

    def release(self, attribute: str, address: str | None) -> None:
        """End the hanging that was asked for with the same arguments; writes that waited go on."""
        self._faults = [
            fault
            for fault in self._faults
            if not (fault.hangs and fault.attribute == attribute and fault.address == address)
        ]
        self._bus.monitor.notify_all()

    def apply(self, attribute: str, address: str) -> None:
        """Let a write have its faults: waits, and raises OSError."""
        seconds = max((fault.seconds for fault in self._of(attribute, address)), default=0.0)
        deadline = time.monotonic() + seconds
        while seconds and (left := deadline - time.monotonic()) > 0:
            self._bus.wait(left)
        while any(fault.hangs for fault in self._of(attribute, address)):
            self.hanging += 1
            try:
                self._bus.wait()
            finally:
                self.hanging -= 1
        for fault in self._of(attribute, address):
            if fault.errno:
                fault.times -= 1
                if fault.times <= 0:
                    self._faults.remove(fault)
                raise failure(fault.errno)

    def _of(self, attribute: str, address: str) -> list[_Fault]:
        return [fault for fault in self._faults if fault.concerns(attribute, address)]
