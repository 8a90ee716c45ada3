"""Discovery of trees of files: which PFs and VFs are found; a partial discovery equals a full one."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_server.devices.discovery import discover
from qat_server.devices.inventory import PhysicalFunction, VirtualFunction
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError
from support.discovery import DRIVERS, PF, VF1, VF2, VF3, discovered, texts
from support.sysfs_tree import SysfsTree, address


def test_a_pf_and_its_vfs(host: SysfsTree) -> None:
    inventory = discovered(host)

    pf = address(PF)
    assert inventory.pfs == (
        PhysicalFunction(
            address=pf,
            device_id=0x4940,
            driver="4xxx",
            numa_node=0,
            state="up",
            services="dc",
            total_vfs=16,
            vfs=(address(VF1), address(VF2), address(VF3)),
        ),
    )
    kernel = VirtualFunction(address(VF1), 0x4941, "4xxxvf", pf, 0, 11, noiommu=False, uio=None, in_use=None)
    vfio = VirtualFunction(address(VF2), 0x4941, "vfio-pci", pf, 0, 12, noiommu=False, uio=None, in_use=False)
    unbound = VirtualFunction(address(VF3), 0x4941, None, pf, 0, 13, noiommu=False, uio=None, in_use=None)
    assert inventory.vfs == (kernel, vfio, unbound)
    assert (inventory.cut, inventory.problems) == ((), ())


def two_domains(tree: SysfsTree) -> None:
    tree.pf("10000:6b:00.0")
    tree.vf("10000:6b:00.1", "10000:6b:00.0")
    tree.pf("0001:05:00.0")
    tree.vf("0001:05:00.1", "0001:05:00.0")
    tree.pf(PF)
    tree.vf(VF1, PF)


def two_drivers(tree: SysfsTree) -> None:
    tree.pf("70:00.0", 0x4946, "420xx")
    tree.vf("70:00.1", "70:00.0", "420xxvf", 0x4947)
    tree.pf(PF)
    tree.vf(VF1, PF)


def driver_not_selected(tree: SysfsTree) -> None:
    tree.pf("3d:00.0", 0x37C8, "c6xx", None, None)
    tree.vf("3d:00.1", "3d:00.0", "c6xxvf", 0x37C9)
    tree.pf(PF)
    tree.vf(VF1, PF)


def more_than_nine_vfs(tree: SysfsTree) -> None:
    tree.pf(PF)
    for function in [*(f"6b:00.{n}" for n in range(1, 8)), *(f"6b:01.{n}" for n in range(5))]:
        tree.vf(function, PF)


def virtual_machine(tree: SysfsTree) -> None:
    tree.vf("00:07.0", None)
    tree.vf("00:06.0", None, "vfio-pci")
    tree.device("00:05.0", 0x37C9, "c6xxvf")
    tree.device("00:04.0", 0x4941, vendor="0x1af4")
    tree.device("00:03.0", 0x1000, "virtio-pci", vendor="0x1af4")


def pf_elsewhere(tree: SysfsTree) -> None:
    tree.pf("70:00.0", driver="vfio-pci")
    tree.pf(PF)
    tree.vf(VF1, PF)


FOUND: dict[str, tuple[Callable[[SysfsTree], None], list[str], list[str]]] = {
    "nothing at all": (lambda tree: None, [], []),
    "every PCI domain": (
        two_domains,
        ["6b:00.0", "0001:05:00.0", "10000:6b:00.0"],
        ["6b:00.1", "0001:05:00.1", "10000:6b:00.1"],
    ),
    "two drivers, by address": (two_drivers, [PF, "70:00.0"], [VF1, "70:00.1"]),
    "a driver that is not selected": (driver_not_selected, [PF], [VF1]),
    "order is of addresses, not of link names": (
        more_than_nine_vfs,
        [PF],
        [f"6b:00.{n}" for n in range(1, 8)] + [f"6b:01.{n}" for n in range(5)],
    ),
    "inside a VM": (virtual_machine, [], ["00:06.0", "00:07.0"]),
    "a PF given away": (pf_elsewhere, [PF], [VF1]),
    "a PF without VFs": (lambda tree: tree.pf(PF), [PF], []),
}


@pytest.mark.parametrize(("build", "pfs", "vfs"), FOUND.values(), ids=FOUND)
def test_found(tree: SysfsTree, build: Callable[[SysfsTree], None], pfs: list[str], vfs: list[str]) -> None:
    build(tree)

    inventory = discovered(tree)

    assert (texts(inventory.pfs), texts(inventory.vfs)) == (pfs, vfs)
    assert inventory.problems == ()


def test_a_driver_that_cannot_be_listed_is_no_vm(host: SysfsTree) -> None:
    folder = host.root / "bus/pci/drivers/4xxx"
    shutil.rmtree(folder)
    folder.symlink_to("4xxx")

    inventory = discovered(host)

    assert (inventory.pfs, inventory.vfs) == ((), ()), "VFs of a PF must not be listed as VFs without a PF"
    assert [problem.address for problem in inventory.problems] == [None]


def devices_is_a_file(root: Path) -> None:
    (root / "bus/pci").mkdir(parents=True)
    (root / "bus/pci/devices").touch()


NO_SYSFS: dict[str, Callable[[Path], object]] = {
    "missing": lambda root: None,
    "a file": lambda root: root.write_text(""),
    "an empty folder": lambda root: root.mkdir(),
    "a loop": lambda root: root.symlink_to(root),
    "bus/pci/devices is a file": devices_is_a_file,
}


@pytest.mark.parametrize("make", NO_SYSFS.values(), ids=NO_SYSFS)
def test_root_is_not_sysfs(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "sys")

    with pytest.raises(SysfsError, match="not a readable sysfs tree"):
        discover(tmp_path / "sys", DRIVERS, 64)


def test_no_more_than_max_devices_in_address_order(host: SysfsTree) -> None:
    assert (texts(discovered(host, most=2).vfs), texts(discovered(host, most=2).cut)) == ([VF1, VF2], [VF3])


def test_an_unusable_vf_does_not_count(host: SysfsTree) -> None:
    host.write(VF1, "vendor", "")

    inventory = discovered(host, most=1)

    assert (texts(inventory.vfs), texts(inventory.cut)) == ([VF2], [VF3])


def test_in_a_vm_only_vfs_are_cut(tree: SysfsTree) -> None:
    virtual_machine(tree)

    inventory = discovered(tree, most=1)

    assert (texts(inventory.vfs), texts(inventory.cut)) == (["00:06.0"], ["00:07.0"])


def test_only_changed_devices_are_read_again(host: SysfsTree) -> None:
    before = discovered(host)
    host.write(VF1, "numa_node", "1\n")
    host.write(VF2, "numa_node", "1\n")

    after = discover(host.root, DRIVERS, 64, before, {address(VF2)})

    assert [vf.numa_node for vf in after.vfs] == [0, 1, 0]
    assert after.vfs[0] is before.vfs[0]


# Partial equals full: random trees, random changes, the devices changed named as the kernel's uevents would.

_PFS = ("6b:00.0", "70:00.0")
_FUNCTIONS = (1, 2, 3, 4)

_Step = tuple[str, int, int]
_STEPS = st.tuples(
    st.sampled_from(["bind", "unbind", "spoil", "mend", "remove", "add", "state", "group", "pf driver", "unlink"]),
    st.integers(0, len(_PFS) - 1),
    st.sampled_from(_FUNCTIONS),
)


def apply(tree: SysfsTree, step: _Step, lone: bool) -> set[PciAddress]:
    """Do one change; the devices that it changes."""
    what, number, function = step
    pf, vf = _PFS[number], f"{_PFS[number][:-1]}{function}"
    there = tree.path(vf).exists()
    if what in ("bind", "unbind", "spoil", "mend", "group", "remove"):
        if not there:
            return set()
        {
            "bind": lambda: tree.bind(vf, "vfio-pci"),
            "unbind": lambda: tree.bind(vf, None),
            "spoil": lambda: tree.write(vf, "device", "?"),
            "mend": lambda: tree.write(vf, "device", "0x4941\n"),
            "group": lambda: tree.group(vf, 40 + function),
            "remove": lambda: tree.remove(vf),
        }[what]()
        return {address(vf)}
    if what == "add" and not there:
        tree.vf(vf, None if lone else pf)
        return {address(vf)}
    if lone or what == "add":
        return set()
    if what == "state":
        tree.write(pf, "qat/state", "down\n" if function % 2 else "up\n")
    elif what == "pf driver":
        tree.bind(pf, None if (tree.path(pf) / "driver").exists() else "4xxx")
    elif what == "unlink":
        (tree.path(pf) / f"virtfn{function - 1}").unlink(missing_ok=True)
    return {address(pf)}


@settings(max_examples=60, deadline=None)
@given(
    lone=st.booleans(),
    most=st.integers(1, 9),
    rounds=st.lists(st.lists(_STEPS, max_size=4), max_size=6),
)
def test_a_partial_discovery_equals_a_full_one(lone: bool, most: int, rounds: list[list[_Step]]) -> None:
    with tempfile.TemporaryDirectory(prefix="qat-", dir="/tmp") as directory:
        tree = SysfsTree(Path(directory) / "sys")
        for pf in _PFS:
            if not lone:
                tree.pf(pf)
            for function in _FUNCTIONS[:3]:
                tree.vf(f"{pf[:-1]}{function}", None if lone else pf)
        inventory = discovered(tree, most=most)
        for steps in rounds:
            changed = set[PciAddress]().union(*(apply(tree, step, lone) for step in steps))
            inventory = discover(tree.root, DRIVERS, most, inventory, changed)
            assert inventory == discovered(tree, most=most)
