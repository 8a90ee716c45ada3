"""The tree on disk: modes, relative links, atomic replacement."""

import os
from pathlib import Path

import pytest

from qat_simulation.kernel.sysfs.tree import Tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "sys", tmp_path / ".kernel")


def test_file_is_replaced_and_its_reader_keeps_the_old_one(tree: Tree) -> None:
    tree.put("a", "1\n", 0o644)
    with open(tree.root / "a") as reader:
        tree.put("a", "a longer text\n", 0o644)
        assert reader.read() == "1\n"
    assert (tree.root / "a").read_text() == "a longer text\n"


def test_modes_hold_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        tree = Tree(tmp_path / "sys", tmp_path / ".kernel")
        tree.put("a", "", 0o644)
        tree.make_directory("b", [("c", "", 0o444)])
        assert [(tree.root / name).stat().st_mode & 0o777 for name in ("a", "b", "b/c")] == [0o644, 0o755, 0o444]
    finally:
        os.umask(before)


def test_links_are_relative_and_can_be_replaced(tree: Tree) -> None:
    tree.make_directory("bus/pci/drivers/one")
    tree.make_directory("bus/pci/drivers/two")
    tree.make_directory("devices/pci0000:6b/0000:6b:00.1", [("power/control", "on\n", 0o644)])
    for name in ("one", "two"):
        tree.link("devices/pci0000:6b/0000:6b:00.1/driver", f"bus/pci/drivers/{name}")
        assert os.readlink(tree.root / "devices/pci0000:6b/0000:6b:00.1/driver") == f"../../../bus/pci/drivers/{name}"


def test_emptied_file_is_restored(tree: Tree) -> None:
    tree.put("a", "(null)\n", 0o644)
    with open(tree.root / "a", "w"):
        pass
    tree.restore("a", "(null)\n", 0o644)
    assert (tree.root / "a").read_text() == "(null)\n"
    tree.restore("not there", "x", 0o644)
    assert not (tree.root / "not there").exists()


def test_nothing_is_left_in_the_staging_directory(tree: Tree) -> None:
    tree.make_directory("a", [("b/c", "1", 0o444)])
    tree.put("d", "1")
    tree.link("e", "a")
    tree.link("e", "d")
    tree.remove_directory("a")
    tree.remove_directory("a")
    tree.unlink("e")
    tree.unlink("e")
    assert os.listdir(tree.root) == ["d"]
    assert os.listdir(tree.staging) == []
