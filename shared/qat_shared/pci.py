"""PCI addresses (domain:bus:device.function, "BDF") in any domain.

A message carries four bounded integers, not text, so that the root process never parses an address from a client.
"""

import re
from typing import Annotated

from msgspec import Meta, Struct

# The kernel prints %04x:%02x:%02x.%d; VMD controllers have domains wider than four digits.
_TEXT = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.ASCII)


class PciAddress(Struct, frozen=True, order=True, array_like=True, forbid_unknown_fields=True):
    """The address of one PCI function. Sorts like lspci; prints as in sysfs (0000:6b:00.1)."""

    domain: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
    bus: Annotated[int, Meta(ge=0, le=0xFF)]
    device: Annotated[int, Meta(ge=0, le=0x1F)]
    function: Annotated[int, Meta(ge=0, le=7)]

    @classmethod
    def parse(cls, text: str) -> "PciAddress":
        """Parse an address in sysfs' format. Raises ValueError."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text[:40]!r} is not a PCI address in lower case, such as 0000:6b:00.1")
        domain, bus, device, function = match.groups()
        if len(domain) > 4 and domain[0] == "0":  # the kernel pads to four digits, never further
            raise ValueError(f"{text[:40]!r} is not a PCI address in the kernel's format: too many leading zeros")
        return cls(int(domain, 16), int(bus, 16), int(device, 16), int(function))

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"
