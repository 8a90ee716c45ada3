"""Discovery on trees of files: what is found, what malformed devices become; a partial look equals a full one."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_server.devices.discovery import discover
from qat_server.devices.inventory import Inventory, PhysicalFunction, VirtualFunction
from qat_shared.pci import PciAddress
from qat_shared.sysfs import SysfsError
from support.sysfs_tree import SysfsTree, address

DRIVERS = ("4xxxvf", "420xxvf")

PF, VF1, VF2, VF3 = "6b:00.0", "6b:00.1", "6b:00.2", "6b:00.3"


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    return SysfsTree(tmp_path / "sys")


@pytest.fixture
def host(tree: SysfsTree) -> SysfsTree:
    """One PF with three VFs: on the kernel's driver, on vfio-pci, on none."""
    tree.pf(PF)
    tree.vf(VF1, PF, group=11)
    tree.vf(VF2, PF, "vfio-pci", group=12)
    tree.vf(VF3, PF, None, group=13)
    return tree


def look(tree: SysfsTree, drivers: tuple[str, ...] = DRIVERS, most: int = 64) -> Inventory:
    return discover(tree.root, drivers, most)


def texts(addresses: object) -> list[str]:
    assert isinstance(addresses, tuple | list)
    return [str(one.address if hasattr(one, "address") else one).removeprefix("0000:") for one in addresses]


def test_what_is_known_of_a_pf_and_its_vfs(host: SysfsTree) -> None:
    inventory = look(host)

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

    inventory = look(tree)

    assert (texts(inventory.pfs), texts(inventory.vfs)) == (pfs, vfs)
    assert inventory.problems == ()


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

    inventory = look(host)

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

    inventory = look(host)

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
    before = look(host)
    spoil(host)

    inventory = look(host)

    assert (texts(inventory.pfs), texts(inventory.vfs)) == (pfs, vfs)
    assert [problem.address for problem in inventory.problems] == [address(whose)]
    assert inventory.problems[0].text
    everything = {*map(address, [PF, *VFS, whose])}
    assert discover(host.root, DRIVERS, 64, before, everything) == inventory


def test_unreadable_services_leave_the_rest_of_the_pf(host: SysfsTree) -> None:
    host.write(PF, "qat/state", b"\xff")

    assert look(host).pfs[0].state is None
    assert look(host).pfs[0].services == "dc"


def test_same_vf_twice_in_one_pf_is_one(host: SysfsTree) -> None:
    host.link(PF, "virtfn7", f"../0000:{VF1}")

    assert texts(look(host).vfs) == [VF1, VF2, VF3]


def test_a_driver_that_cannot_be_listed_is_no_vm(host: SysfsTree) -> None:
    folder = host.root / "bus/pci/drivers/4xxx"
    shutil.rmtree(folder)
    folder.symlink_to("4xxx")

    inventory = look(host)

    assert (inventory.pfs, inventory.vfs) == ((), ()), "VFs of a PF must not be taken for lone ones"
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
    assert (texts(look(host, most=2).vfs), texts(look(host, most=2).cut)) == ([VF1, VF2], [VF3])


def test_an_unusable_vf_takes_no_place(host: SysfsTree) -> None:
    host.write(VF1, "vendor", "")

    inventory = look(host, most=1)

    assert (texts(inventory.vfs), texts(inventory.cut)) == ([VF2], [VF3])


def test_in_a_vm_only_vfs_are_cut(tree: SysfsTree) -> None:
    virtual_machine(tree)

    inventory = look(tree, most=1)

    assert (texts(inventory.vfs), texts(inventory.cut)) == (["00:06.0"], ["00:07.0"])


def test_only_what_changed_is_read_again(host: SysfsTree) -> None:
    before = look(host)
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
def test_a_partial_look_equals_a_full_one(lone: bool, most: int, rounds: list[list[_Step]]) -> None:
    with tempfile.TemporaryDirectory(prefix="qat-", dir="/tmp") as directory:
        tree = SysfsTree(Path(directory) / "sys")
        for pf in _PFS:
            if not lone:
                tree.pf(pf)
            for function in _FUNCTIONS[:3]:
                tree.vf(f"{pf[:-1]}{function}", None if lone else pf)
        inventory = look(tree, most=most)
        for steps in rounds:
            changed = set[PciAddress]().union(*(apply(tree, step, lone) for step in steps))
            inventory = discover(tree.root, DRIVERS, most, inventory, changed)
            assert inventory == look(tree, most=most)
