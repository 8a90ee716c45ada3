"""The sysfs readers, on trees like the kernel's and on malformed ones."""

import os
from pathlib import Path

import pytest

from qat_shared.pci import PciAddress
from qat_shared.sysfs import (
    MalformedError,
    MissingError,
    SysfsError,
    open_device,
    pci_directory,
)
from support.sysfs_tree import SysfsTree, address

PF, VF = "6b:00.0", "6b:00.1"


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    tree = SysfsTree(tmp_path / "sys")
    tree.pf(PF)
    tree.vf(VF, PF, group=7)
    return tree


def read(tree: SysfsTree, name: str, device: str = VF) -> str:
    with open_device(tree.root, address(device)) as opened:
        return opened.read(name)


def test_attributes_are_read(tree: SysfsTree) -> None:
    with open_device(tree.root, address(VF)) as device:
        assert device.read("vendor") == "0x8086"
        assert device.read_int("device", 16) == 0x4941
        assert device.read_optional("no_such") is None
        assert device.link("driver") == "4xxxvf"
        assert device.link("iommu_group") == "7"
        assert device.link("no_such") is None
        assert device.linked_address("physfn") == address(PF)
        assert device.names("no_such") == []
        assert "vendor" in device.names()
    with open_device(tree.root, address(PF)) as device:
        assert list(device.virtual_functions()) == [("virtfn0", address(VF))]
        assert device.read("qat/state") == "up"


MALFORMED = {
    "empty": b"",
    "white space": b" \n",
    "binary": b"\x80\xff\x00\x01",
    "with a zero": b"0x80\x0086",
    "huge": b"0" * 10_000,
    "a page of digits": b"1" * 4096,
    "with an underscore": b"1_0",
    "a word": b"vendor\n",
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_number_is_a_typed_error(tree: SysfsTree, content: bytes) -> None:
    tree.write(VF, "numa_node", content)
    with open_device(tree.root, address(VF)) as device, pytest.raises(MalformedError, match="numa_node"):
        device.read_int("numa_node")


def test_a_missing_attribute_is_missing(tree: SysfsTree) -> None:
    with pytest.raises(MissingError):
        read(tree, "no_such")
    with pytest.raises(MissingError):
        read(tree, "vendor/no_such")


def test_a_folder_in_place_of_a_file_is_malformed(tree: SysfsTree) -> None:
    with pytest.raises(MalformedError):
        read(tree, "qat", PF)


def test_a_loop_of_links_is_malformed(tree: SysfsTree) -> None:
    tree.link(VF, "numa_node", "loop")
    tree.link(VF, "loop", "numa_node")
    tree.link(VF, "folder", "folder")
    with pytest.raises(MalformedError):
        read(tree, "numa_node")
    with open_device(tree.root, address(VF)) as device, pytest.raises(MalformedError):
        device.names("folder")


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tree: SysfsTree) -> None:
    pipe = tree.path(VF) / "pipe"
    os.mkfifo(pipe)
    assert read(tree, "pipe") == ""
    writer = os.open(pipe, os.O_RDWR)
    try:
        with pytest.raises(SysfsError, match="pipe"):
            read(tree, "pipe")
    finally:
        os.close(writer)


def test_dangling_links_and_files_in_place_of_links(tree: SysfsTree) -> None:
    tree.link(PF, "virtfn1", "../0000:6b:00.2")
    tree.link(PF, "virtfn10", "somewhere else")
    tree.write(PF, "virtfn2", "a file\n")
    with open_device(tree.root, address(PF)) as device:
        found = list(device.virtual_functions())
        with pytest.raises(MalformedError, match="not a link"):
            device.link("vendor")
    assert [name for name, _ in found] == ["virtfn0", "virtfn1", "virtfn2", "virtfn10"], "in the order of numbers"
    assert found[1][1] == address("6b:00.2")
    assert [type(what) for _, what in found[2:]] == [MalformedError, MalformedError]
    with pytest.raises(MissingError), open_device(tree.root, address("6b:00.2")):
        pass


def test_a_link_whose_target_is_no_text_is_malformed(tree: SysfsTree) -> None:
    os.symlink(b"../\xff\xfe", bytes(tree.path(VF)) + b"/odd")
    with open_device(tree.root, address(VF)) as device, pytest.raises(MalformedError, match="not text"):
        device.link("odd")


def test_a_device_link_to_another_device_is_refused(tree: SysfsTree) -> None:
    link = tree.root / "bus/pci/devices" / str(address(VF))
    link.unlink()
    link.symlink_to(tree.path(PF))
    with pytest.raises(MalformedError, match="not to the device itself"), open_device(tree.root, address(VF)):
        pass


def test_a_device_link_that_loops_is_malformed(tree: SysfsTree) -> None:
    (tree.root / "bus/pci/devices/0000:00:01.0").symlink_to("0000:00:01.0")
    with pytest.raises(MalformedError), open_device(tree.root, PciAddress(0, 0, 1, 0)):
        pass


def test_a_device_removed_while_open_is_missing(tree: SysfsTree) -> None:
    with open_device(tree.root, address(VF)) as device:
        tree.remove(VF)
        with pytest.raises(MissingError):
            device.read("vendor")
        assert device.link("driver") is None


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("x"), lambda path: path.mkdir()])
def test_a_directory_that_is_not_sysfs_is_reported(tmp_path: Path, make: "object") -> None:
    root = tmp_path / "root"
    assert callable(make)
    make(root)
    with pytest.raises(SysfsError, match="not a readable sysfs tree"):
        pci_directory(root)


def test_nothing_stays_open(tree: SysfsTree) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name in ("vendor", "no_such", "qat"):
        for _ in range(5):
            try:
                read(tree, name, PF)
            except SysfsError:
                continue
    assert len(os.listdir("/proc/self/fd")) == before
