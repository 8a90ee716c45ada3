"""The checks of doctor: a table of nodes with one fault each."""

import msgspec
import pytest

from qat_server.binding.apparmor import AppArmor
from qat_server.command_line.doctor.checks import run_checks
from qat_server.command_line.doctor.findings import Finding, Level
from qat_server.command_line.doctor.observations import NO_HEARTBEAT, HelperAnswer, NodeObservations, QatFunction
from qat_server.command_line.settings import parse
from support.sysfs_tree import address

PF = address("6b:00.0")
VF = address("6b:00.1")
ALL = (
    "BindDriver",
    "OpenPodResources",
    "PrepareSocketDirectory",
    "ReadDeviceConfig",
    "ReadHeartbeat",
    "RegisterResource",
)
GOOD = NodeObservations(
    functions=(
        QatFunction(PF, 0x4940, "4xxx", 1, num_vfs=1, total_vfs=16),
        QatFunction(VF, 0x4941, "vfio-pci", 2),
    ),
    drivers=frozenset({"4xxx", "4xxxvf", "vfio-pci"}),
    groups={1: (str(PF),), 2: (str(VF),)},
    kernel=(6, 1),
    vfio_device=True,
    apparmor=AppArmor(False),
    selinux_enforcing=False,
    kubelet_roots=("/var/lib/kubelet",),
    plugin_directory="open",
    helper=HelperAnswer(error="", version="1", operations=ALL, heartbeats={PF: ""}),
)
OLD = (QatFunction(address("3d:00.0"), 0x37C8, "c6xx", 3, 1, 4), QatFunction(address("3d:01.0"), 0x37C9, "c6xxvf", 4))
OLD_ONLY = {"functions": OLD, "groups": {3: ("0000:3d:00.0",), 4: ("0000:3d:01.0",)}}


def found(node: NodeObservations, **settings: str) -> list[Finding]:
    given = {name.replace("_", "-"): text for name, text in settings.items()}
    return [finding for finding in run_checks(node, parse(given)) if finding.level is not Level.OK]


def test_a_good_node_has_only_good_findings() -> None:
    assert found(GOOD) == []
    assert {finding.check for finding in run_checks(GOOD, parse())} == {
        "devices",
        "PF driver",
        "SR-IOV",
        "IOMMU",
        "VF driver",
        "security module",
        "kubelet",
        "helper",
    }


def functions(*changed: QatFunction) -> dict[str, object]:
    by_address = {function.address: function for function in (*GOOD.functions, *changed)}
    return {"functions": tuple(by_address[key] for key in sorted(by_address))}


ONE_FAULT: dict[str, tuple[dict[str, object], Level, str, str]] = {
    "no device": ({"functions": ()}, Level.PROBLEM, "there is no QAT device on any PCI bus", "4940 4941"),
    "unreadable device": (
        {"problems": ("0000:6b:00.0: device: not text",)},
        Level.PROBLEM,
        "cannot read a device: 0000:6b:00.0",
        "dmesg",
    ),
    "PF on no driver": (
        functions(QatFunction(PF, 0x4940, None, 1, 1, 16)),
        Level.PROBLEM,
        "0000:6b:00.0 is not bound to a driver; expected 4xxx",
        "modprobe qat_4xxx",
    ),
    "PF whose driver is not in the kernel": (
        functions(QatFunction(PF, 0x6F54, None, 1, 1, 16)),
        Level.PROBLEM,
        "is not bound to a driver; expected d15xx",
        "Intel's driver package",
    ),
    "no SR-IOV": (
        functions(QatFunction(PF, 0x4940, "4xxx", 1)),
        Level.PROBLEM,
        "SR-IOV is not available for 0000:6b:00.0",
        "firmware setup",
    ),
    "no VFs": (
        functions(QatFunction(PF, 0x4940, "4xxx", 1, 0, 16)),
        Level.PROBLEM,
        "has 0 of 16 VFs enabled",
        "sriov_numvfs",
    ),
    "no IOMMU": ({"groups": {}}, Level.PROBLEM, "the IOMMU is off", "intel_iommu=on"),
    "no IOMMU, with intel_iommu=on": (
        {"groups": {}, "command_line": "quiet intel_iommu=on"},
        Level.PROBLEM,
        "the IOMMU is off",
        "is already set",
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
        functions(QatFunction(VF, 0x4941, "4xxxvf", 2)),
        Level.NOTE,
        "1 VF bound to 4xxxvf; expected vfio-pci",
        "binds them",
    ),
    "VF on another driver": (
        functions(QatFunction(VF, 0x4941, "uio_pci_generic", 2)),
        Level.PROBLEM,
        "0000:6b:00.1 is bound to uio_pci_generic",
        "/sys/bus/pci/drivers/uio_pci_generic/unbind",
    ),
    "AppArmor": ({"apparmor": AppArmor(True)}, Level.NOTE, "AppArmor is on", "Permission denied"),
    "AppArmor that refused to bind": (
        {"apparmor": AppArmor(True, "cri-containerd.apparmor.d"), "refused": (str(VF),)},
        Level.PROBLEM,
        "AppArmor is on, and the helper was not permitted to bind 0000:6b:00.1 (Permission denied)",
        "(this one is under cri-containerd.apparmor.d) refuses every write to /sys: give the helper's container "
        "securityContext.appArmorProfile {type: Unconfined}",
    ),
    "AppArmor that refused under the project's profiles": (
        {"apparmor": AppArmor(True, "qat-server"), "refused": (str(VF),)},
        Level.PROBLEM,
        "AppArmor is on, and the helper was not permitted to bind",
        "/etc/apparmor.d/local/qat-helper",
    ),
    "SELinux": ({"selinux_enforcing": True}, Level.NOTE, "SELinux is enforcing", "container_device_plugin_t"),
    "another kubelet directory": (
        {"kubelet_roots": ("/var/lib/k0s/kubelet",)},
        Level.PROBLEM,
        "the kubelet's --root-dir is /var/lib/k0s/kubelet",
        "--kubelet-dir=/var/lib/k0s/kubelet",
    ),
    "socket directory closed": (
        {"plugin_directory": "closed"},
        Level.NOTE,
        "is not accessible to the current user",
        "that user",
    ),
    "socket directory missing": ({"plugin_directory": "missing"}, Level.NOTE, "does not exist", "--root-dir"),
    "no helper": ({"helper": HelperAnswer(error="no such file")}, Level.PROBLEM, "no such file", "start qat-helper"),
    "policy": (
        {"helper": msgspec.structs.replace(GOOD.helper, operations=ALL[1:])},
        Level.NOTE,
        "the helper's policy forbids BindDriver",
        "policy file",
    ),
    "dead firmware": (
        {"helper": msgspec.structs.replace(GOOD.helper, heartbeats={PF: NO_HEARTBEAT})},
        Level.PROBLEM,
        "no heartbeat from 0000:6b:00.0: its firmware does not answer",
        "auto_reset",
    ),
    "no heartbeat": (
        {"helper": msgspec.structs.replace(GOOD.helper, heartbeats={PF: "is debugfs mounted"})},
        Level.NOTE,
        "no heartbeat from 0000:6b:00.0: is debugfs mounted",
        "only on the PF's state",
    ),
}


@pytest.mark.parametrize(("changes", "level", "text", "advice"), ONE_FAULT.values(), ids=ONE_FAULT)
def test_one_fault(changes: dict[str, object], level: Level, text: str, advice: str) -> None:
    findings = found(msgspec.structs.replace(GOOD, **changes))
    matching = [finding for finding in findings if text in finding.text]
    assert [finding.level for finding in matching] == [level], findings
    assert advice in matching[0].advice


def test_devices_that_are_not_served() -> None:
    (finding,) = found(GOOD, kernel_vf_drivers="420xxvf")
    assert (finding.check, finding.level) == ("devices", Level.PROBLEM)
    assert finding.advice.endswith("--kernel-vf-drivers=420xxvf,4xxxvf")
    both = msgspec.structs.replace(GOOD, functions=(*OLD, *GOOD.functions), groups=GOOD.groups | {3: (), 4: ()})
    assert [each.level for each in found(both) if "were found but are not served" in each.text] == [Level.NOTE]


@pytest.mark.parametrize(
    ("kernel", "disabled", "refused"),
    [((6, 1), False, True), ((6, 1), None, True), ((6, 1), True, False), ((5, 8), None, False)],
    ids=["new, off", "new, not to be read", "new, on", "old"],
)
def test_the_deny_list_of_vfio(kernel: tuple[int, int], disabled: bool | None, refused: bool) -> None:
    node = msgspec.structs.replace(GOOD, **OLD_ONLY, kernel=kernel, denylist_disabled=disabled)
    advice = [each.advice for each in found(node, kernel_vf_drivers="c6xxvf") if "deny list" in each.text]
    assert len(advice) == refused
    assert all("disable_denylist=1" in each for each in advice)
    assert not [each for each in found(node, kernel_vf_drivers="c6xxvf", dpdk_driver="igb_uio") if "deny" in each.text]


def test_a_vm_has_vfs_only() -> None:
    node = msgspec.structs.replace(
        GOOD, functions=GOOD.functions[1:], helper=msgspec.structs.replace(GOOD.helper, heartbeats={})
    )
    assert found(node) == []
