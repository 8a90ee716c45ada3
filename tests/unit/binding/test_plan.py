"""The binding plan: which VFs are bound and which are left alone."""

import pytest

from qat_server.binding.plan import Plan, plan_bindings
from qat_server.devices.inventory import Inventory, VirtualFunction
from qat_shared.messages import DpdkDriver
from support.sysfs_tree import address

VF = address("6b:00.1")
VFIO, UIO = DpdkDriver.VFIO_PCI, DpdkDriver.IGB_UIO
BIND, LEAVE = Plan((VF,), ()), Plan((), ())


def foreign(driver: str) -> Plan:
    return Plan((), ((VF, driver),))


PLANS: dict[str, tuple[str | None, int, DpdkDriver, Plan]] = {
    "no driver": (None, 0x4941, VFIO, BIND),
    "its kernel driver": ("4xxxvf", 0x4941, VFIO, BIND),
    "its kernel driver, for igb_uio": ("4xxxvf", 0x4941, UIO, BIND),
    "c6xxvf": ("c6xxvf", 0x37C9, VFIO, BIND),
    "bound": ("vfio-pci", 0x4941, VFIO, LEAVE),
    "bound to igb_uio": ("igb_uio", 0x4941, UIO, LEAVE),
    "the other DPDK driver": ("igb_uio", 0x4941, VFIO, foreign("igb_uio")),
    "the other way round": ("vfio-pci", 0x4941, UIO, foreign("vfio-pci")),
    "somebody's driver": ("uio_pci_generic", 0x4941, VFIO, foreign("uio_pci_generic")),
    "the kernel driver of other VFs": ("420xxvf", 0x4941, VFIO, foreign("420xxvf")),
}


@pytest.mark.parametrize(("bound", "device_id", "wanted", "expected"), PLANS.values(), ids=PLANS)
def test_plan(bound: str | None, device_id: int, wanted: DpdkDriver, expected: Plan) -> None:
    vf = VirtualFunction(VF, device_id, bound, None, None, None, noiommu=False, uio=None, in_use=None)
    assert plan_bindings(Inventory((), (vf,), (), ()), wanted) == expected


def test_vfs_over_the_limit_are_left_alone() -> None:
    assert plan_bindings(Inventory((), (), (VF,), ()), VFIO) == LEAVE
