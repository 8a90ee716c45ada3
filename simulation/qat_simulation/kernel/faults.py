"""Faults injected into the emulated kernel by a test or a person: writes that fail, are slow, or never return.

The waits of the real kernel are elsewhere: for an open VF in drivers.py, for a device's lock in bus.py.

A fault applies to writes to one attribute (state or qat/state, driver_override, unbind, ...), of one device or of all.
For bind, unbind and drivers_probe the device is the one in the written text. The attribute "probe" stands for a driver
that probes a device.
"""

import time
from dataclasses import dataclass

from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.model import os_error


@dataclass(slots=True)
class _Fault:
    attribute: str
    address: str | None
    errno: int = 0
    times: int = 0
    seconds: float = 0.0
    hangs: bool = False

    def matches(self, attribute: str, address: str) -> bool:
        same = self.attribute in (attribute, attribute.rpartition("/")[2])
        return same and self.address in (None, address)


class Faults:
    """The active faults. Every method is called with the bus's monitor held."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._faults: list[_Fault] = []
        self.hanging = 0
        """How many writes wait for `release`."""

    def fail(self, attribute: str, address: str | None, number: int, times: int) -> None:
        """Let the next `times` writes fail with this errno and change nothing."""
        self._faults.append(_Fault(attribute, address, errno=number, times=times))

    def delay(self, attribute: str, address: str | None, seconds: float) -> None:
        """Let each write wait this long before it takes effect; 0 removes the delay."""
        self._faults = [
            fault
            for fault in self._faults
            if not (fault.seconds and fault.attribute == attribute and fault.address == address)
        ]
        if seconds > 0:
            self._faults.append(_Fault(attribute, address, seconds=seconds))

    def hang(self, attribute: str, address: str | None) -> None:
        """Let writes wait until `release`."""
        self._faults.append(_Fault(attribute, address, hangs=True))

    def release(self, attribute: str, address: str | None) -> None:
        """Remove the hang that was set with the same arguments; writes that waited continue."""
        self._faults = [
            fault
            for fault in self._faults
            if not (fault.hangs and fault.attribute == attribute and fault.address == address)
        ]
        self._bus.monitor.notify_all()

    def apply(self, attribute: str, address: str) -> None:
        """Apply the faults that match a write: waits, and raises OSError."""
        seconds = max((fault.seconds for fault in self._matching(attribute, address)), default=0.0)
        deadline = time.monotonic() + seconds
        while seconds and (left := deadline - time.monotonic()) > 0:
            self._bus.wait(left)
        while any(fault.hangs for fault in self._matching(attribute, address)):
            self.hanging += 1
            try:
                self._bus.wait()
            finally:
                self.hanging -= 1
        for fault in self._matching(attribute, address):
            if fault.errno:
                fault.times -= 1
                if fault.times <= 0:
                    self._faults.remove(fault)
                raise os_error(fault.errno)

    def _matching(self, attribute: str, address: str) -> list[_Fault]:
        return [fault for fault in self._faults if fault.matches(attribute, address)]
