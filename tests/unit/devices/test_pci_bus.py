"""The devices on the PCI bus, the devices of a driver, and the PFs without a driver."""

import shutil
from collections.abc import Callable

import pytest

from qat_server.devices.pci_bus import VF_DRIVERS, driver_addresses, pci_addresses, pf_driver_of, pfs_without_driver
from support.sysfs_tree import SysfsTree, address

PF = "6b:00.0"


def test_addresses_are_in_order_and_other_names_are_skipped(tree: SysfsTree) -> None:
    for name in ("10000:01:00.0", "70:00.0", PF):
        tree.pf(name)
    (tree.root / "bus/pci/devices/notes").touch()
    (tree.root / "bus/pci/drivers/4xxx/bind").touch()
    expected = [address(PF), address("70:00.0"), address("10000:01:00.0")]
    assert pci_addresses(tree.root) == expected
    assert driver_addresses(tree.root, "4xxx") == expected
    assert driver_addresses(tree.root, "420xx") == [], "a driver that is not loaded has no devices"


def test_a_vf_is_on_the_bus_and_on_its_driver(tree: SysfsTree) -> None:
    vf = address("6b:00.1")
    tree.pf(PF)
    tree.vf(str(vf), PF, "4xxxvf")
    assert pci_addresses(tree.root) == [address(PF), vf]
    assert driver_addresses(tree.root, "4xxxvf") == [vf]
    (tree.root / "bus/pci/devices/not an address").mkdir()
    assert pci_addresses(tree.root) == [address(PF), vf]
    assert driver_addresses(tree.root, "not_loaded") == []


PFS: dict[str, tuple[Callable[[SysfsTree], object], bool]] = {
    "without a driver": (lambda tree: tree.pf(PF, driver=None), True),
    "on its driver": (lambda tree: tree.pf(PF), False),
    "on another driver": (lambda tree: tree.pf(PF, driver="pci-stub"), False),
    "of a driver that is not selected": (lambda tree: tree.pf(PF, 0x4946, driver=None), False),
    "not provisionable": (lambda tree: tree.pf(PF, 0x19E2, driver=None), False),
    "not Intel": (lambda tree: tree.pf(PF, driver=None, vendor="0x1234"), False),
    "a VF": (lambda tree: tree.device(PF, 0x4941), False),
    "unreadable": (lambda tree: tree.pf(PF, driver=None, vendor="no number"), False),
    "no PCI bus": (lambda tree: shutil.rmtree(tree.root / "bus"), False),
}


@pytest.mark.parametrize(("build", "found"), PFS.values(), ids=PFS)
def test_pfs_without_driver(tree: SysfsTree, build: Callable[[SysfsTree], object], found: bool) -> None:
    build(tree)
    assert pfs_without_driver(tree.root, {"4xxx", "c3xxx"}) == ([address(PF)] if found else [])


def test_each_vf_driver_has_a_pf_driver() -> None:
    assert {pf_driver_of(driver) + "vf" for driver in VF_DRIVERS} == VF_DRIVERS
