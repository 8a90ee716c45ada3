"""What doctor reads of a node, and what it says about it: one table, a node with one thing wrong at a time."""

from pathlib import Path

import msgspec
import pytest

from qat_server.binding.apparmor import AppArmor
from qat_server.command_line.doctor.checks import Finding, Level, diagnose
from qat_server.command_line.doctor.facts import DEAD, Facts, Function, Helper, read_facts
from qat_server.command_line.settings import parse
from qat_shared.pci import PciAddress
from support.sysfs_tree import SysfsTree, address

PF = address("6b:00.0")
VF = address("6b:00.1")
ALL = ("BindDriver", "OpenKubeletSocket", "PrepareSocketDirectory", "ReadDeviceConfig", "ReadHeartbeat")
GOOD = Facts(
    functions=(
        Function(PF, 0x4940, "4xxx", 1, num_vfs=1, total_vfs=16),
        Function(VF, 0x4941, "vfio-pci", 2),
    ),
    drivers=frozenset({"4xxx", "4xxxvf", "vfio-pci"}),
    groups={1: (str(PF),), 2: (str(VF),)},
    kernel=(6, 1),
    vfio_device=True,
    apparmor=AppArmor(False),
    selinux_enforcing=False,
    kubelet_roots=("/var/lib/kubelet",),
    plugin_directory="open",
    helper=Helper(error="", version="1", operations=ALL, heartbeats={PF: ""}),
)
OLD = (Function(address("3d:00.0"), 0x37C8, "c6xx", 3, 1, 4), Function(address("3d:01.0"), 0x37C9, "c6xxvf", 4))
OLD_ONLY = {"functions": OLD, "groups": {3: ("0000:3d:00.0",), 4: ("0000:3d:01.0",)}}


def found(facts: Facts, **settings: str) -> list[Finding]:
    given = {name.replace("_", "-"): text for name, text in settings.items()}
    return [finding for finding in diagnose(facts, parse(given)) if finding.level is not Level.OK]


def test_of_a_good_node_nothing_is_said_but_that_it_is_good() -> None:
    assert found(GOOD) == []
    assert {finding.check for finding in diagnose(GOOD, parse())} == {
        "devices",
        "PF driver",
        "SR-IOV",
        "IOMMU",
        "VF driver",
        "security module",
        "kubelet",
        "helper",
    }


def functions(*changed: Function) -> dict[str, object]:
    by_address = {function.address: function for function in (*GOOD.functions, *changed)}
    return {"functions": tuple(by_address[key] for key in sorted(by_address))}


ONE_WRONG: dict[str, tuple[dict[str, object], Level, str, str]] = {
    "no device": ({"functions": ()}, Level.PROBLEM, "no QAT device is on any PCI bus", "4940 4941"),
    "unreadable device": ({"problems": ("0000:6b:00.0: device: not text",)}, Level.PROBLEM, "cannot be read", "dmesg"),
    "PF on no driver": (
        functions(Function(PF, 0x4940, None, 1, 1, 16)),
        Level.PROBLEM,
        "0000:6b:00.0 is on no driver, not on 4xxx",
        "modprobe qat_4xxx",
    ),
    "PF whose driver is not in the kernel": (
        functions(Function(PF, 0x6F54, None, 1, 1, 16)),
        Level.PROBLEM,
        "is on no driver, not on d15xx",
        "Intel's driver package",
    ),
    "no SR-IOV": (functions(Function(PF, 0x4940, "4xxx", 1)), Level.PROBLEM, "cannot have VFs", "firmware setup"),
    "no VFs": (
        functions(Function(PF, 0x4940, "4xxx", 1, 0, 16)),
        Level.PROBLEM,
        "has no VFs, of 16 that it can have",
        "sriov_numvfs",
    ),
    "no IOMMU": ({"groups": {}}, Level.PROBLEM, "the IOMMU is off", "intel_iommu=on"),
    "no IOMMU though the kernel was told": (
        {"groups": {}, "command_line": "quiet intel_iommu=on"},
        Level.PROBLEM,
        "the IOMMU is off",
        "is given already",
    ),
    "no IOMMU, and VFIO without one": ({"groups": {}, "noiommu": True}, Level.NOTE, "no IOMMU", "for tests only"),
    "shared group": (
        {"groups": {1: (str(PF),), 2: (str(VF), "0000:00:1f.0")}},
        Level.NOTE,
        "0000:6b:00.1 shares IOMMU group 2 with 0000:00:1f.0",
        "ACS",
    ),
    "no vfio-pci": ({"drivers": frozenset({"4xxx"})}, Level.PROBLEM, "vfio-pci is not loaded", "modprobe vfio-pci"),
    "VFs to be bound": (
        functions(Function(VF, 0x4941, "4xxxvf", 2)),
        Level.NOTE,
        "1 VF on 4xxxvf, not on vfio-pci",
        "binds them",
    ),
    "VF that is somebody else's": (
        functions(Function(VF, 0x4941, "uio_pci_generic", 2)),
        Level.PROBLEM,
        "0000:6b:00.1 is on uio_pci_generic",
        "/sys/bus/pci/drivers/uio_pci_generic/unbind",
    ),
    "AppArmor": ({"apparmor": AppArmor(True)}, Level.NOTE, "AppArmor is on", "Permission denied"),
    "AppArmor that refused to bind": (
        {"apparmor": AppArmor(True, "cri-containerd.apparmor.d"), "refused": (str(VF),)},
        Level.PROBLEM,
        "AppArmor is on, and the helper was refused (Permission denied) to bind 0000:6b:00.1",
        "(this one is under cri-containerd.apparmor.d) refuses every write to /sys: give the helper's container "
        "securityContext.appArmorProfile {type: Unconfined}",
    ),
    "AppArmor that refused under the project's profiles": (
        {"apparmor": AppArmor(True, "qat-server"), "refused": (str(VF),)},
        Level.PROBLEM,
        "AppArmor is on, and the helper was refused",
        "/etc/apparmor.d/local/qat-helper",
    ),
    "SELinux": ({"selinux_enforcing": True}, Level.NOTE, "SELinux is enforcing", "container_device_plugin_t"),
    "another kubelet directory": (
        {"kubelet_roots": ("/var/lib/k0s/kubelet",)},
        Level.PROBLEM,
        "the kubelet's directory is /var/lib/k0s/kubelet",
        "--kubelet-dir=/var/lib/k0s/kubelet",
    ),
    "socket directory closed": ({"plugin_directory": "closed"}, Level.NOTE, "is closed to the user", "that user"),
    "socket directory missing": ({"plugin_directory": "missing"}, Level.NOTE, "is not there", "--root-dir"),
    "no helper": ({"helper": Helper(error="no such file")}, Level.PROBLEM, "no such file", "start qat-helper"),
    "policy": (
        {"helper": msgspec.structs.replace(GOOD.helper, operations=ALL[1:])},
        Level.NOTE,
        "the helper's policy forbids BindDriver",
        "policy file",
    ),
    "dead firmware": (
        {"helper": msgspec.structs.replace(GOOD.helper, heartbeats={PF: DEAD})},
        Level.PROBLEM,
        "no heartbeat of 0000:6b:00.0: its firmware does not answer",
        "auto_reset",
    ),
    "no heartbeat": (
        {"helper": msgspec.structs.replace(GOOD.helper, heartbeats={PF: "is debugfs mounted"})},
        Level.NOTE,
        "no heartbeat of 0000:6b:00.0: is debugfs mounted",
        "state only",
    ),
}


@pytest.mark.parametrize(("changes", "level", "text", "advice"), ONE_WRONG.values(), ids=ONE_WRONG)
def test_one_thing_that_is_wrong(changes: dict[str, object], level: Level, text: str, advice: str) -> None:
    findings = found(msgspec.structs.replace(GOOD, **changes))
    said = [finding for finding in findings if text in finding.text]
    assert [finding.level for finding in said] == [level], findings
    assert advice in said[0].advice


def test_devices_that_are_not_served() -> None:
    (finding,) = found(GOOD, kernel_vf_drivers="420xxvf")
    assert (finding.check, finding.level) == ("devices", Level.PROBLEM)
    assert finding.advice.endswith("--kernel-vf-drivers=420xxvf,4xxxvf")
    both = msgspec.structs.replace(GOOD, functions=(*OLD, *GOOD.functions), groups=GOOD.groups | {3: (), 4: ()})
    assert [each.level for each in found(both) if "not among those served" in each.text] == [Level.NOTE]


@pytest.mark.parametrize(
    ("kernel", "disabled", "refused"),
    [((6, 1), False, True), ((6, 1), None, True), ((6, 1), True, False), ((5, 8), None, False)],
    ids=["new, off", "new, not to be read", "new, on", "old"],
)
def test_the_deny_list_of_vfio(kernel: tuple[int, int], disabled: bool | None, refused: bool) -> None:
    facts = msgspec.structs.replace(GOOD, **OLD_ONLY, kernel=kernel, denylist_disabled=disabled)
    advice = [each.advice for each in found(facts, kernel_vf_drivers="c6xxvf") if "deny list" in each.text]
    assert len(advice) == refused
    assert all("disable_denylist=1" in each for each in advice)
    assert not [each for each in found(facts, kernel_vf_drivers="c6xxvf", dpdk_driver="igb_uio") if "deny" in each.text]


def test_a_vm_has_vfs_only() -> None:
    facts = msgspec.structs.replace(
        GOOD, functions=GOOD.functions[1:], helper=msgspec.structs.replace(GOOD.helper, heartbeats={})
    )
    assert found(facts) == []


# Reading


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


def read(tree: SysfsTree) -> Facts:
    root = tree.root.parent
    return read_facts(tree.root, root / "proc", root / "dev", root / "plugins", Helper())


def test_functions_drivers_and_groups(tree: SysfsTree) -> None:
    tree.write("6b:00.1", "device", "banana\n")
    tree.vf("6b:00.2", "6b:00.0", None, group=8)
    facts = read(tree)
    assert facts.functions == (
        Function(PF, 0x4940, "4xxx", None, 2, 16),
        Function(PciAddress.parse("0000:6b:00.2"), 0x4941, None, 8),
    )
    assert [problem for problem in facts.problems if "banana" in problem] == list(facts.problems)
    assert len(facts.problems) == 1
    assert facts.drivers == {"4xxx", "vfio-pci"}
    assert facts.groups.keys() == {7, 8}


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
    facts = read(tree)
    assert (facts.denylist_disabled, facts.apparmor.enabled, facts.selinux_enforcing) == (True, False, True)
    assert (facts.kernel, facts.plugin_directory) == ((5, 10), "missing")
