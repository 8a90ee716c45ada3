"""The base in a cluster, installed by the README's commands, and what a user does with it."""

import re

from cluster.cluster_node import Cluster, step
from cluster.cluster_nodes import EIGHT
from cluster.readme import look_commands
from cluster.static_pod import workload
from kubelet.nodes import CY


def test_the_readmes_commands_install_it(cluster: Cluster) -> None:
    cluster.clear()
    with step("the README's commands to install, until the pod is ready and eight VFs are allocatable"):
        cluster.install(EIGHT)
        cluster.until_allocatable(cy=8)
    described = cluster.install(EIGHT)
    assert len(re.findall(rf"^ +{CY}: +8$", described, re.MULTILINE)) == 2, described


def test_pods_get_what_they_ask_for_and_wait_while_there_is_too_little(cluster: Cluster) -> None:
    cluster.install(EIGHT)
    cluster.until_allocatable(cy=8)
    with step("a pod with two VFs applied, until it holds them open"):
        cluster.apply(workload("two", {CY: 2}))
        seen = cluster.client("two")
    addresses = [seen["environment"][name] for name in ("QAT0", "QAT1")]
    assert sorted(name for name in seen["environment"] if name.startswith("QAT")) == ["QAT0", "QAT1"]
    node = cluster.node
    groups = {address: node.group(address) for address in addresses}
    assert {address: each["group"] for address, each in seen["devices"].items()} == groups
    assert seen["vfio"] == sorted(["vfio", *map(str, groups.values())])
    assert sorted(filter(node.is_open, node.vfs())) == sorted(addresses)

    cluster.apply(workload("nine", {CY: 9}), workload("seven", {CY: 7}))
    for name in ("nine", "seven"):
        assert f"Unschedulable: 0/1 nodes are available: 1 Insufficient {CY}." in cluster.unscheduled(name)
        assert cluster.get(f"pod {name}")["status"]["phase"] == "Pending"
    with step("a pod deleted, until one that has waited for its VFs holds them open"):
        cluster.delete("two")
        assert len(cluster.client("seven")["devices"]) == 7
    nine = cluster.get("pod nine")
    assert (nine["status"]["phase"], nine["spec"].get("nodeName")) == ("Pending", None)


def test_doctor_status_and_metrics(cluster: Cluster) -> None:
    """By the README's commands; scraped from another pod, as Prometheus does, and through the API server."""
    cluster.install(EIGHT)
    cluster.until_allocatable(cy=8)
    cluster.apply(workload("one", {CY: 1}))
    holder = cluster.client("one")["environment"]["QAT0"]
    doctor, status = map(cluster.run, look_commands())
    assert "8 VFs bound to vfio-pci" in doctor
    assert "✗" not in doctor
    assert "ready" in status.splitlines()[0]
    (line,) = [line for line in status.splitlines() if "default/one/main" in line]
    assert line.startswith(holder)
    plugin = cluster.plugin()
    address = cluster.get(f"pod -n qat-plugin {plugin}")["status"]["podIP"]
    program = f"import urllib.request as u; print(u.urlopen('http://{address}:9090/metrics').read().decode())"
    for metrics in (
        cluster.run(f'kubectl exec one -- python3 -c "{program}"'),
        cluster.run(f"kubectl get --raw /api/v1/namespaces/qat-plugin/pods/{plugin}:9090/proxy/metrics"),
    ):
        assert 'qat_plugin_devices{health="healthy",resource="cy"} 8.0' in metrics
        assert 'qat_plugin_registered{resource="cy"} 1.0' in metrics
        assert "qat_plugin_helper_up 1.0" in metrics
