"""Which services a QAT device can be given, as the kernel's driver decides it (qat/cfg_services).

From the kernel's adf_cfg_services.c (names, their order, no service twice), adf_gen4_hw_data.c and adf_6xxx_hw_data.c
(services_supported). Sets of services, not strings: the order in which they are written does not count.
"""

from typing import Final

SERVICES: Final = ("asym", "sym", "dc", "decomp", "dcc")
"""In the kernel's order: the one in which it shows them."""

_GEN6: Final = 0x4948


def parse_services(text: str) -> tuple[str, ...] | None:
    """The services of a `;` list in the kernel's order; None when one is unknown, missing or there twice."""
    words = text.split(";")
    if len(set(words)) != len(words) or not set(words) <= set(SERVICES):
        return None
    return tuple(service for service in SERVICES if service in words)


def services_allowed(device_id: int, text: str) -> bool:
    """Whether a PF with this device id takes this `;` list. dcc is alone; Gen4 has two at most, Gen6 three."""
    services = parse_services(text)
    if services is None:
        return False
    if device_id != _GEN6 and "decomp" in services:
        return False
    if len(services) == 1:
        return True
    return "dcc" not in services and len(services) <= (3 if device_id == _GEN6 else 2)


def what_is_allowed(device_id: int) -> str:
    """What `services_allowed` takes on a PF with this device id, in words."""
    if device_id == _GEN6:
        return "Gen6 takes at most three of asym, sym, dc, decomp, or dcc alone"
    return "Gen4 takes at most two of asym, sym, dc, or dcc alone"
