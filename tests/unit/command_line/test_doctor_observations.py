"""The observations of doctor, from a sysfs tree and a /proc."""

from pathlib import Path

import pytest

from qat_server.command_line.doctor.observations import NodeObservations, QatFunction, observe_node
from qat_shared.pci import PciAddress
from support.sysfs_tree import SysfsTree, address

PF = address("6b:00.0")


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    tree = SysfsTree(tmp_path / "sys")
    tree.pf("6b:00.0", sriov_numvfs="2")
    tree.vf("6b:00.1", "6b:00.0", "vfio-pci", group=7)
    tree.device("02:00.0", 0x1572, "i40e")
    return tree


def process(proc: Path, pid: int, *command: str) -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "comm").write_text(f"{command[0].rpartition('/')[2]}\n")
    (folder / "cmdline").write_bytes("\0".join(command).encode() + b"\0")


def read(tree: SysfsTree) -> NodeObservations:
    root = tree.root.parent
    return observe_node(tree.root, root / "proc", root / "dev", root / "plugins")


def test_functions_drivers_and_groups(tree: SysfsTree) -> None:
    tree.write("6b:00.1", "device", "banana\n")
    tree.vf("6b:00.2", "6b:00.0", None, group=8)
    node = read(tree)
    assert node.functions == (
        QatFunction(PF, 0x4940, "4xxx", None, 2, 16),
        QatFunction(PciAddress.parse("0000:6b:00.2"), 0x4941, None, 8),
    )
    assert [problem for problem in node.problems if "banana" in problem] == list(node.problems)
    assert len(node.problems) == 1
    assert node.drivers == {"4xxx", "vfio-pci"}
    assert node.groups.keys() == {7, 8}


@pytest.mark.parametrize(
    ("command", "roots"),
    [
        (("/usr/bin/kubelet", "--config=/etc/k"), ("/var/lib/kubelet",)),
        (("kubelet", "--root-dir=/data/kubelet"), ("/data/kubelet",)),
        (("kubelet", "-root-dir", "/data/kubelet", "--v=2"), ("/data/kubelet",)),
        (("bash", "--root-dir=/data/kubelet"), ()),
    ],
)
def test_the_root_directory_of_a_running_kubelet(
    tree: SysfsTree, command: tuple[str, ...], roots: tuple[str, ...]
) -> None:
    process(tree.root.parent / "proc", 71, *command)
    assert read(tree).kubelet_roots == roots


def test_switches_of_modules_and_of_the_kernel(tree: SysfsTree) -> None:
    before = read(tree)
    assert (before.denylist_disabled, before.apparmor.enabled, before.selinux_enforcing) == (None, None, None)
    for name, text in (
        ("module/vfio_pci/parameters/disable_denylist", "Y\n"),
        ("module/apparmor/parameters/enabled", "N\n"),
        ("fs/selinux/enforce", "1"),
    ):
        (tree.root / name).parent.mkdir(parents=True)
        (tree.root / name).write_text(text)
    kernel = tree.root.parent / "proc/sys/kernel"
    kernel.mkdir(parents=True)
    (kernel / "osrelease").write_text("5.10.0-28-amd64\n")
    node = read(tree)
    assert (node.denylist_disabled, node.apparmor.enabled, node.selinux_enforcing) == (True, False, True)
    assert (node.kernel, node.plugin_directory) == ((5, 10), "missing")
