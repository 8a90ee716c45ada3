"""The services that a QAT device accepts in qat/cfg_services, as the kernel's driver checks them.

From the kernel's adf_cfg_services.c (names, their order, no service twice), adf_gen4_hw_data.c and adf_6xxx_hw_data.c
(services_supported). The order in which services are written does not matter.
"""

from typing import Final

SERVICES: Final = ("asym", "sym", "dc", "decomp", "dcc")
"""In the order in which the kernel shows them."""

_GEN6: Final = 0x4948


def parse_services(text: str) -> tuple[str, ...] | None:
    """The services of a `;` list in the kernel's order; None if one is unknown, empty or repeated."""
    words = text.split(";")
    if len(set(words)) != len(words) or not set(words) <= set(SERVICES):
        return None
    return tuple(service for service in SERVICES if service in words)


def services_allowed(device_id: int, text: str) -> bool:
    """Whether a PF with this device id accepts this `;` list. dcc only alone; Gen4 at most two, Gen6 three."""
    services = parse_services(text)
    if services is None:
        return False
    if device_id != _GEN6 and "decomp" in services:
        return False
    if len(services) == 1:
        return True
    return "dcc" not in services and len(services) <= (3 if device_id == _GEN6 else 2)


def services_rule(device_id: int) -> str:
    """The rule of `services_allowed` for this device id, as a sentence."""
    if device_id == _GEN6:
        return "Gen6 accepts at most three of asym, sym, dc, decomp, or dcc alone"
    return "Gen4 accepts at most two of asym, sym, dc, or dcc alone"
