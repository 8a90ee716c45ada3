"""What is bound and what is left alone; when a failed binding is tried again."""

import pytest

from qat_server.binding.plan import Plan, plan
from qat_server.devices.inventory import Inventory, VirtualFunction
from qat_server.helper_client.backoff import Backoff
from qat_shared.messages import DpdkDriver
from support.sysfs_tree import address

VF, OTHER = address("6b:00.1"), address("6b:00.2")
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
    assert plan(Inventory((), (vf,), (), ()), wanted) == expected


def test_what_is_cut_is_left_alone() -> None:
    assert plan(Inventory((), (), (VF,), ()), VFIO) == LEAVE


def test_delays_double_up_to_a_minute() -> None:
    attempts, now, delays = Backoff(), 100.0, []
    for _ in range(9):
        assert attempts.due(VF, now)
        attempts = attempts.failed(VF, now)
        due = attempts.next_due(now)
        assert due is not None
        assert not attempts.due(VF, due - 0.001)
        delays.append(due - now)
        now = due

    assert delays == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_each_vf_waits_by_itself() -> None:
    attempts = Backoff().failed(VF, 10.0).failed(OTHER, 10.2)

    assert (attempts.due(VF, 10.5), attempts.due(OTHER, 10.5)) == (True, False)
    assert attempts.next_due(10.0) == 10.5
    assert attempts.next_due(10.5) == 10.7, "what is due already is being done, and no reason to wake up"
    assert attempts.next_due(11.0) is None


def test_what_is_bound_or_gone_is_forgotten() -> None:
    attempts = Backoff().failed(VF, 10.0).failed(VF, 11.0).failed(OTHER, 10.0)

    assert attempts.keep({VF, OTHER}) is attempts
    kept = attempts.keep({OTHER})
    assert kept.due(VF, 10.0)
    assert kept.failed(VF, 20.0).next_due(20.0) == 20.5, "it begins anew"
    assert kept.next_due(10.0) == 10.5


def test_many_failures_do_not_overflow() -> None:
    attempts = Backoff()
    for _ in range(2000):
        attempts = attempts.failed(VF, 0.0)
    assert attempts.next_due(0.0) == 60.0
