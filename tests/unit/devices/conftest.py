"""Sysfs trees for the tests of the devices room."""

from pathlib import Path

import pytest

from support.discovery import PF, VF1, VF2, VF3
from support.sysfs_tree import SysfsTree


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    return SysfsTree(tmp_path / "sys")


@pytest.fixture
def host(tree: SysfsTree) -> SysfsTree:
    """One PF with three VFs: on the kernel's driver, on vfio-pci, and without a driver."""
    tree.pf(PF)
    tree.vf(VF1, PF, group=11)
    tree.vf(VF2, PF, "vfio-pci", group=12)
    tree.vf(VF3, PF, None, group=13)
    return tree
