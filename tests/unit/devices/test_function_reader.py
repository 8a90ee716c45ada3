"""The fields of PFs and VFs, and the problems that malformed devices become, through discovery of a tree of files."""

import os
import shutil
from collections.abc import Callable

import pytest

from qat_server.devices.discovery import discover
from support.discovery import DRIVERS, PF, VF1, VF2, VF3, discovered, texts
from support.sysfs_tree import SysfsTree, address


def on_igb_uio(tree: SysfsTree) -> None:
    tree.bind(VF2, "igb_uio")
    (tree.path(VF2) / "uio/uio12").mkdir(parents=True)


VF_FIELDS: dict[str, tuple[Callable[[SysfsTree], None], dict[str, object]]] = {
    "no NUMA": (lambda tree: tree.write(VF2, "numa_node", "-1\n"), {"numa_node": None}),
    "a kernel without NUMA": (lambda tree: (tree.path(VF2) / "numa_node").unlink(), {"numa_node": None}),
    "second NUMA node": (lambda tree: tree.write(VF2, "numa_node", "1\n"), {"numa_node": 1}),
    "held open": (lambda tree: tree.write(VF2, "enable", "1\n"), {"in_use": True}),
    "opened twice": (lambda tree: tree.write(VF2, "enable", "2\n"), {"in_use": True}),
    "no IOMMU": (
        lambda tree: tree.group(VF2, 3, noiommu=True),
        {"iommu_group": 3, "noiommu": True},
    ),
    "vfio-pci without a group": (
        lambda tree: (tree.path(VF2) / "iommu_group").unlink(),
        {"iommu_group": None, "noiommu": False},
    ),
    "on igb_uio": (
        on_igb_uio,
        {"driver": "igb_uio", "uio": "uio12", "in_use": None},
    ),
    "on igb_uio without a uio device": (lambda tree: tree.bind(VF2, "igb_uio"), {"driver": "igb_uio", "uio": None}),
    "on another driver": (lambda tree: tree.bind(VF2, "uio_pci_generic"), {"driver": "uio_pci_generic"}),
}


@pytest.mark.parametrize(("change", "fields"), VF_FIELDS.values(), ids=VF_FIELDS)
def test_vf_fields(host: SysfsTree, change: Callable[[SysfsTree], object], fields: dict[str, object]) -> None:
    change(host)

    inventory = discovered(host)

    assert inventory.problems == ()
    assert {name: getattr(inventory.vfs[1], name) for name in fields} == fields


PF_FIELDS: dict[str, tuple[Callable[[SysfsTree], None], dict[str, object]]] = {
    "down": (lambda tree: tree.write(PF, "qat/state", "down\n"), {"state": "down", "services": "dc"}),
    "a driver without qat/": (
        lambda tree: shutil.rmtree(tree.path(PF) / "qat"),
        {"state": None, "services": None},
    ),
    "no SR-IOV": (lambda tree: (tree.path(PF) / "sriov_totalvfs").unlink(), {"total_vfs": 0}),
}


@pytest.mark.parametrize(("change", "fields"), PF_FIELDS.values(), ids=PF_FIELDS)
def test_pf_fields(host: SysfsTree, change: Callable[[SysfsTree], object], fields: dict[str, object]) -> None:
    change(host)

    inventory = discovered(host)

    assert inventory.problems == ()
    assert {name: getattr(inventory.pfs[0], name) for name in fields} == fields


def loop(tree: SysfsTree, name: str) -> None:
    link = tree.root / "bus/pci/devices" / str(address(name))
    link.unlink()
    link.symlink_to(link.name)


def leads_elsewhere(tree: SysfsTree) -> None:
    link = tree.root / "bus/pci/devices" / str(address(VF2))
    link.unlink()
    link.symlink_to(f"../../../devices/pci0000:6b/0000:{VF1}")


def unlink(name: str, file: str) -> Callable[[SysfsTree], None]:
    return lambda tree: (tree.path(name) / file).unlink()


def vf_of_two(tree: SysfsTree) -> None:
    tree.pf("70:00.0")
    tree.link("70:00.0", "virtfn0", f"../../pci0000:6b/0000:{VF2}")


def directory_for_vendor(tree: SysfsTree) -> None:
    unlink(VF2, "vendor")(tree)
    (tree.path(VF2) / "vendor").mkdir()


def pipe_for_vendor(tree: SysfsTree) -> None:
    unlink(VF2, "vendor")(tree)
    os.mkfifo(tree.path(VF2) / "vendor")


def file_for(name: str, link: str) -> Callable[[SysfsTree], None]:
    def change(tree: SysfsTree) -> None:
        unlink(name, link)(tree)
        tree.write(name, link, "vfio-pci")

    return change


# what is done to a device, whose problem it is, what is left of PFs and VFs
VFS = [VF1, VF2, VF3]
BAD: dict[str, tuple[Callable[[SysfsTree], object], str, list[str], list[str]]] = {
    "empty vendor": (lambda tree: tree.write(VF2, "vendor", ""), VF2, [PF], [VF1, VF3]),
    "binary device id": (lambda tree: tree.write(VF2, "device", b"\x00\xff\xfe"), VF2, [PF], [VF1, VF3]),
    "NUL in the device id": (lambda tree: tree.write(VF2, "device", b"0x4941\0\n"), VF2, [PF], [VF1, VF3]),
    "huge device id": (lambda tree: tree.write(VF2, "device", b"0" * 100_000), VF2, [PF], [VF1, VF3]),
    "wrong vendor": (lambda tree: tree.write(VF2, "vendor", "0x1af4\n"), VF2, [PF], [VF1, VF3]),
    "id outside the table": (lambda tree: tree.write(VF2, "device", "0x1572\n"), VF2, [PF], [VF1, VF3]),
    "id of a VF that is not selected": (lambda tree: tree.write(VF2, "device", "0x37c9\n"), VF2, [PF], [VF1, VF3]),
    "a directory for an attribute": (directory_for_vendor, VF2, [PF], [VF1, VF3]),
    "no enable on vfio-pci": (unlink(VF2, "enable"), VF2, [PF], [VF1, VF3]),
    "NUMA node is a word": (lambda tree: tree.write(VF2, "numa_node", "one\n"), VF2, [PF], [VF1, VF3]),
    "NUMA node is huge": (lambda tree: tree.write(VF2, "numa_node", "9" * 4000), VF2, [PF], [VF1, VF3]),
    "IOMMU group is a word": (lambda tree: tree.link(VF2, "iommu_group", "../x"), VF2, [PF], [VF1, VF3]),
    "driver is a file": (file_for(VF2, "driver"), VF2, [PF], [VF1, VF3]),
    "driver leads nowhere": (lambda tree: tree.link(VF2, "driver", "../"), VF2, [PF], [VF1, VF3]),
    "a pipe for an attribute": (pipe_for_vendor, VF2, [PF], [VF1, VF3]),
    "vanished VF": (lambda tree: tree.remove(VF2), VF2, [PF], [VF1, VF3]),
    "loop of links": (lambda tree: loop(tree, VF2), VF2, [PF], [VF1, VF3]),
    "link to another device": (leads_elsewhere, VF2, [PF], [VF1, VF3]),
    "virtfn is no address": (lambda tree: tree.link(PF, "virtfn1", "../banana"), PF, [PF], [VF1, VF3]),
    "virtfn is a file": (file_for(PF, "virtfn1"), PF, [PF], [VF1, VF3]),
    "virtfn leads to the PF": (lambda tree: tree.link(PF, "virtfn1", f"../0000:{PF}"), PF, [PF], [VF1, VF3]),
    "virtfn of two PFs": (vf_of_two, "70:00.0", [PF, "70:00.0"], VFS),
    "unreadable state": (lambda tree: tree.write(PF, "qat/state", b"\xff"), PF, [PF], VFS),
    "unreadable services": (lambda tree: tree.write(PF, "qat/cfg_services", b"x" * 5000), PF, [PF], VFS),
    "PF of another vendor": (lambda tree: tree.write(PF, "vendor", "0x1af4\n"), PF, [], []),
    "PF with the id of another driver": (lambda tree: tree.write(PF, "device", "0x4946\n"), PF, [], []),
    "PF with an empty id": (lambda tree: tree.write(PF, "device", ""), PF, [], []),
    "PF with a word for its number of VFs": (lambda tree: tree.write(PF, "sriov_totalvfs", "all"), PF, [], []),
    "PF is a loop": (lambda tree: loop(tree, PF), PF, [], []),
}


@pytest.mark.parametrize(("spoil", "whose", "pfs", "vfs"), BAD.values(), ids=BAD)
def test_a_malformed_device_is_its_own_problem(
    host: SysfsTree, spoil: Callable[[SysfsTree], object], whose: str, pfs: list[str], vfs: list[str]
) -> None:
    before = discovered(host)
    spoil(host)

    inventory = discovered(host)

    assert (texts(inventory.pfs), texts(inventory.vfs)) == (pfs, vfs)
    assert [problem.address for problem in inventory.problems] == [address(whose)]
    assert inventory.problems[0].text
    everything = {*map(address, [PF, *VFS, whose])}
    assert discover(host.root, DRIVERS, 64, before, everything) == inventory


def test_unreadable_services_leave_the_rest_of_the_pf(host: SysfsTree) -> None:
    host.write(PF, "qat/state", b"\xff")

    assert discovered(host).pfs[0].state is None
    assert discovered(host).pfs[0].services == "dc"


def test_same_vf_twice_in_one_pf_is_one(host: SysfsTree) -> None:
    host.link(PF, "virtfn7", f"../0000:{VF1}")

    assert texts(discovered(host).vfs) == [VF1, VF2, VF3]
