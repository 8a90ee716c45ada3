"""The overlay for Node Feature Discovery, with the real one: its worker looks at the node's devices and modules, its
master evaluates our rule, and by the label that it sets the DaemonSet's pod comes and goes."""

from collections.abc import Iterator
from typing import Final

import pytest

from cluster.cluster_node import Cluster, step
from cluster.cluster_nodes import EIGHT
from cluster.nfd import HARDWARE, FeatureDiscovery
from cluster.node import HOST_NAME, LABEL
from cluster.static_pod import workload
from kernel.nodes import IN_A_VM
from kubelet.nodes import CY
from qat_simulation.node.description import Node

_OVERLAY: Final = "deployments/overlays/nfd"
_RULE: Final = f"{_OVERLAY}/node-feature-rule.yaml"
_NO_QAT: Final = Node(others=IN_A_VM.others)
"""A device of Intel's that is none of ours."""


@pytest.fixture
def discovery(cluster: Cluster) -> Iterator[FeatureDiscovery]:
    """Set up, on a node without the plugin and without the hardware label."""
    cluster.clear()
    cluster.run(f"kubectl label node {HOST_NAME} {HARDWARE}-")
    found = FeatureDiscovery(cluster)
    try:
        found.start()
        yield found
    finally:
        cluster.run(f"kubectl delete --ignore-not-found --wait --timeout=600s -k {_OVERLAY}", check=False)
        found.remove()


def test_the_rule_sets_the_label_where_there_is_qat_and_vfio_pci(cluster: Cluster, discovery: FeatureDiscovery) -> None:
    cluster.run(f"kubectl apply -f {_RULE}")
    cluster.node.devices(_NO_QAT)
    assert not discovery.look()
    cluster.node.devices(EIGHT)
    assert discovery.look()
    assert HARDWARE in discovery.owned()
    cluster.guest.run("modprobe -r vfio-pci")
    assert not discovery.look()
    cluster.node.devices(IN_A_VM)
    assert discovery.look()
    cluster.run(f"kubectl delete -f {_RULE}")
    discovery.until_not_labelled()


def test_a_label_set_by_hand_is_the_rules_once_it_has_matched(cluster: Cluster, discovery: FeatureDiscovery) -> None:
    """As the deployments' README says."""
    cluster.run(f"set -e; kubectl apply -f {_RULE}; kubectl label node {HOST_NAME} {LABEL}")
    cluster.node.devices(_NO_QAT)
    assert discovery.look()
    assert HARDWARE not in discovery.owned()
    cluster.node.devices(EIGHT)
    assert discovery.look()
    assert HARDWARE in discovery.owned()
    discovery.forget()
    discovery.until_not_labelled()


def test_the_overlay_installs_the_plugin_where_the_label_says_so(cluster: Cluster, discovery: FeatureDiscovery) -> None:
    cluster.node.devices(EIGHT)
    cluster.run(f"kubectl apply -k {_OVERLAY}")
    daemon_set = "-n qat-plugin daemonset/qat-plugin"
    seen = "--for=jsonpath='{.status.observedGeneration}'=1"
    cluster.until_is("the controller has seen the DaemonSet", f"{seen} {daemon_set}")
    assert cluster.get(daemon_set)["status"]["desiredNumberScheduled"] == 0
    assert cluster.get("pods -n qat-plugin")["items"] == []
    with step("Node Feature Discovery's worker started, until the node is labelled and eight VFs are allocatable"):
        discovery.watch()
        discovery.until_labelled()
        plugin = cluster.until_rolled_out()
        cluster.until_allocatable(cy=8)
    cluster.apply(workload("two", {CY: 2}))
    assert len(cluster.client("two")["devices"]) == 2
    cluster.delete("two")
    with step("QAT taken out, until the worker has seen it, the label is gone, and the plugin's pod"):
        cluster.node.devices(_NO_QAT)
        discovery.until_not_labelled()
        cluster.until_is(f"{plugin} is gone", f"-n qat-plugin --for=delete pod/{plugin}")
    cluster.until_is("no pod is wanted", f"--for=jsonpath='{{.status.desiredNumberScheduled}}'=0 {daemon_set}")
