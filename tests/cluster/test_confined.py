"""AppArmor on the node: without our settings the cause is named; with the hardened overlay both processes are under the
project's own profiles. Beside that, what else that overlay and the one for VMs are: pods as users apply them."""

from cluster.installation import Installation
from cluster.node import KubeletNode
from cluster.readme import profile_commands
from cluster.static_pod import workload
from deployments import rendered
from kernel.machine import PROJECT
from kernel.nodes import IN_A_VM, TWO_SMALL
from kubelet.nodes import CY, GENERIC


def _label(node: KubeletNode, name: str) -> str:
    return node.guest.run(f"cat /proc/{node.pid('qat-plugin', name)}/attr/current").strip()


def test_without_our_setting_log_and_doctor_name_apparmor(installed: Installation, node: KubeletNode) -> None:
    manifests = rendered.render("base")
    (helper,) = rendered.pod_spec(manifests)["initContainers"]
    del helper["securityContext"]["appArmorProfile"]
    installed.devices(TWO_SMALL)
    node.plugin(manifests)
    node.until_running("qat-plugin", "server")
    assert _label(node, "helper") == "cri-containerd.apparmor.d (enforce)"

    def said() -> str:
        log = node.log("qat-plugin", "server")
        return log if "VF not bound" in log else ""

    log = node.guest.wait("the server says that nothing is bound", said)
    assert "Permission denied" in log
    assert "AppArmor" in log
    doctor = node.execute("qat-plugin", "server", "qat-plugin", "doctor", check=False)
    assert "AppArmor is on" in doctor
    assert node.resources()["allocatable"] == {}
    installed.clear()


def test_hardened_runs_under_the_projects_own_profiles(installed: Installation, node: KubeletNode) -> None:
    """Also: seccomp profiles from the node, in pods."""
    commands = profile_commands()
    assert "apparmor_parser --replace" in commands
    node.guest.run(f"set -e; cd {PROJECT}; dmesg --clear; {commands}")
    installed.plugin(TWO_SMALL, rendered.render("overlays/hardened"))
    assert _label(node, "helper") == "qat-helper (enforce)"
    assert _label(node, "server") == "qat-server (enforce)"
    assert len(node.resources(f"{CY}=4")["allocatable"][CY]) == 4
    node.apply(workload("two", {CY: 2}))
    environment = node.client("two")["environment"]
    assert node.resources()["pods"]["two-node"] == {"main": {CY: sorted((environment["QAT0"], environment["QAT1"]))}}
    # Each registration is in the log, and nothing was made in the plugin watcher's directory.
    audit = node.guest.run("grep RegisterResource /var/log/qat-plugin/audit.jsonl | tail -n 1")
    assert '"accepted":true' in audit
    assert node.guest.run("ls -A /var/lib/kubelet/plugins_registry") == ""
    # The profiles leave out nothing that they need.
    assert node.guest.run("dmesg | grep 'apparmor=\"DENIED\"' | grep 'profile=\"qat-'", check=False) == ""
    status = node.execute("qat-plugin", "server", "qat-plugin", "status")
    assert "server sandbox: complete" in status
    assert "ready" in status.splitlines()[0]


def test_in_a_vm_vfs_without_pfs_are_served(installed: Installation, node: KubeletNode) -> None:
    installed.plugin(IN_A_VM, rendered.render("overlays/vm"))
    assert len(node.resources(f"{GENERIC}=3")["allocatable"][GENERIC]) == 3
    node.apply(workload("all", {GENERIC: 3}))
    seen = node.client("all")
    assert set(seen["devices"]) == {vf.address for vf in IN_A_VM.vfs}
    # What is nobody's here stays so.
    (foreign,) = IN_A_VM.others
    said = node.guest.run(f"cd /sys/bus/pci/devices/{foreign.address}; cat driver_override; ls -d driver", check=False)
    assert said.startswith("(null)\n")
    assert "No such file" in said
