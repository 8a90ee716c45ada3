"""The names of the kernel's QAT drivers, out of the device table."""

from typing import Final

from qat_shared.devices import PHYSICAL, VIRTUAL

VF_DRIVERS: Final = frozenset(kind.driver for kind in VIRTUAL.values())
"""Every kernel VF driver of the table: what --kernel-vf-drivers may name."""

PF_DRIVERS: Final = frozenset(kind.driver for kind in PHYSICAL.values())


def pf_driver_of(vf_driver: str) -> str:
    """The PF driver beside a kernel VF driver of the table (4xxxvf: 4xxx)."""
    return vf_driver.removesuffix("vf")
