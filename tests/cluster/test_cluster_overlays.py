"""Other overlays in a cluster: `hardened`, with the project's profiles; `vm`, VFs without PFs."""

from typing import Final

from cluster.cluster_node import Cluster, step
from cluster.cluster_nodes import EIGHT
from cluster.readme import profile_commands
from cluster.static_pod import workload
from kernel.nodes import IN_A_VM
from kubelet.nodes import CY, GENERIC

_AUDIT: Final = "/var/log/qat-plugin/audit.jsonl"


def test_hardened_registers_by_the_helper(cluster: Cluster) -> None:
    cluster.run(f"set -e; {profile_commands()}")
    cluster.clear()
    cluster.guest.run(f"mv {_AUDIT} {_AUDIT}.before", check=False)
    with step("the hardened overlay installed, until eight VFs are allocatable"):
        cluster.install(EIGHT, "deployments/overlays/hardened")
        cluster.until_allocatable(cy=8)
    for name, label in (("helper", "qat-helper (enforce)"), ("server", "qat-server (enforce)")):
        pid = cluster.node.pid(cluster.plugin(), name)
        assert cluster.guest.run(f"cat /proc/{pid}/attr/current").strip() == label
    assert cluster.guest.run("ls -A /var/lib/kubelet/device-plugins/qat.intel.com") != ""
    cluster.apply(workload("two", {CY: 2}))
    assert len(cluster.client("two")["devices"]) == 2
    with step("hardened: rollout restart, until another pod is ready and eight are allocatable"):
        old = cluster.plugin()
        cluster.run("kubectl -n qat-plugin rollout restart ds/qat-plugin")
        cluster.until_replaced(old)
        cluster.until_allocatable(cy=8)
    cluster.apply(workload("late", {CY: 6}))
    assert len(cluster.client("late")["devices"]) == 6
    # Each registration is in the log, and nothing was made in the plugin watcher's directory.
    assert '"resource":"qat.intel.com/cy"' in cluster.guest.run(f"grep RegisterResource {_AUDIT}")
    assert cluster.guest.run("ls -A /var/lib/kubelet/plugins_registry") == ""


def test_in_a_vm_vfs_without_pfs_are_served(cluster: Cluster) -> None:
    with step("the overlay for VMs installed, until three VFs are allocatable"):
        cluster.install(IN_A_VM, "deployments/overlays/vm")
        cluster.until_allocatable(generic=3)
    cluster.apply(workload("all", {GENERIC: 3}))
    assert set(cluster.client("all")["devices"]) == {vf.address for vf in IN_A_VM.vfs}
