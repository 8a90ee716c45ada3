"""The actual state of a PF: attributes that may be missing or malformed, and which of its VFs are open."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from qat_server.devices.inventory import PhysicalFunction, Problem
from qat_server.provisioning.actual_state import ActualState, read_actual_state, read_actual_states
from support.sysfs_tree import SysfsTree, address

AT = address("6b:00.0")
PF = PhysicalFunction(AT, 0x4940, "4xxx", 0, "up", "dc", 16, ())


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    return SysfsTree(tmp_path)


def test_read(tree: SysfsTree) -> None:
    tree.pf("6b:00.0", sriov_numvfs="never read: reading may block")
    tree.write("6b:00.0", "qat/auto_reset", "on\n")
    tree.write("6b:00.0", "qat/pm_idle_enabled", "0\n")
    tree.vf("6b:00.1", "6b:00.0", "vfio-pci", enable="1")
    tree.vf("6b:00.2", "6b:00.0", "vfio-pci", enable="0")
    tree.vf("6b:00.3", "6b:00.0", "4xxxvf", enable="1")
    tree.vf("6b:00.4", "6b:00.0", "vfio-pci", enable=None)
    tree.vf("6b:00.5", "6b:00.0", None, enable="1")  # its unbind waits for its user
    tree.vf("6b:00.6", "6b:00.0", None)
    tree.link("6b:00.0", "virtfn9", "../0000:6b:01.0")  # has just vanished
    tree.link("6b:00.0", "virtfn8", "../nonsense")
    assert read_actual_state(tree.root, AT) == ActualState(True, False, 8, 16, (address("6b:00.1"), address("6b:00.5")))


def test_unreadable_vf_counts_as_open(tree: SysfsTree) -> None:
    tree.pf("6b:00.0")
    tree.vf("6b:00.1", "6b:00.0", "vfio-pci")
    tree.write("6b:00.1", "enable", b"\xff")
    assert read_actual_state(tree.root, AT).open_vfs == (address("6b:00.1"),)


def test_attributes_of_an_old_driver(tree: SysfsTree) -> None:
    tree.pf("6b:00.0", 0x37C8, "c6xx", None, None, sriov_totalvfs=None)
    assert read_actual_state(tree.root, AT) == ActualState(None, None, 0, 0)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("qat/auto_reset", "maybe\n", "qat/auto_reset: 'maybe' is neither on nor off"),
        ("sriov_totalvfs", "\n", "sriov_totalvfs: '' is not a number of VFs"),
        ("sriov_totalvfs", "-1\n", "sriov_totalvfs: '-1' is not a number of VFs"),
        ("sriov_totalvfs", "99999\n", "sriov_totalvfs: '99999' is not a number of VFs"),
        ("sriov_totalvfs", b"\xff\n", "sriov_totalvfs: not text"),
    ],
)
def test_malformed(tree: SysfsTree, name: str, content: str | bytes, why: str) -> None:
    tree.pf("6b:00.0")
    tree.pf("6c:00.0")
    tree.write("6b:00.0", name, content)
    other = replace(PF, address=address("6c:00.0"))
    states = read_actual_states(tree.root, [PF, other])
    assert states[AT] == Problem(AT, why)
    assert states[other.address] == ActualState(None, None, 0, 16)


def test_pf_that_is_gone(tree: SysfsTree) -> None:
    assert read_actual_states(tree.root, [PF]) == {AT: Problem(AT, "device: No such file or directory")}
