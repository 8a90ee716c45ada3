"""Provisioning in a cluster: from PFs as they are booted to pods; a ConfigMap that changes under a running pod."""

import json
from typing import Final

from cluster.cluster_node import Cluster, step
from cluster.cluster_nodes import AS_BOOTED
from cluster.node import HOST_NAME
from cluster.static_pod import workload
from kubelet.nodes import CY, DC

_OVERLAY: Final = "deployments/overlays/qat_initcontainer"


def _change(cluster: Cluster, **files: str) -> None:
    """Change the ConfigMap; the kubelet's mounts of it follow within its own time (a minute, mostly)."""
    patch = json.dumps({"data": files})
    cluster.run(f"kubectl -n qat-plugin patch configmap qat-config --type=merge -p '{patch}'")


def _services(cluster: Cluster) -> dict[str, set[str]]:
    """What each PF has; the kernel shows it in an order of its own."""
    paths = {pf.address: f"/sys/bus/pci/devices/{pf.address}/qat/cfg_services" for pf in AS_BOOTED.pfs}
    return {address: set(cluster.guest.run(f"cat {path}").strip().split(";")) for address, path in paths.items()}


def test_from_pfs_as_booted_to_pods_without_a_privileged_container(cluster: Cluster) -> None:
    cluster.clear()
    with step("the provisioning overlay installed on PFs as booted, until eight VFs are allocatable"):
        cluster.install(AS_BOOTED, _OVERLAY)
        cluster.until_allocatable(cy=8)
    assert list(_services(cluster).values()) == [{"sym", "asym"}] * 2
    cluster.apply(workload("two", {CY: 2}))
    assert len(cluster.client("two")["devices"]) == 2
    for pod in cluster.get("pods --all-namespaces")["items"]:
        for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
            context = container.get("securityContext", {})
            assert not context.get("privileged")
            if pod["metadata"]["namespace"] == "qat-plugin":
                assert context["capabilities"] == {"drop": ["ALL"]}


def test_a_change_of_the_configmap_waits_for_a_pod_and_then_happens(cluster: Cluster) -> None:
    cluster.install(AS_BOOTED, _OVERLAY)
    _change(cluster, **{"qat.conf": "ServicesEnabled=sym;asym\n"})
    cluster.until_allocatable(cy=8)
    cluster.apply(workload("holder", {CY: 1}))
    holder = cluster.client("holder")["environment"]["QAT0"]
    busy = cluster.guest.run(f"basename $(readlink -f /sys/bus/pci/devices/{holder}/physfn)").strip()
    before = cluster.get("pod holder")["status"]["containerStatuses"]
    with step("a ConfigMap changed while a pod holds a VF, until the other PF has the new services"):
        _change(cluster, **{"qat.conf": "ServicesEnabled=dc\n"})
        cluster.until_allocatable(cy=4, dc=4)
    status = cluster.run("kubectl -n qat-plugin exec ds/qat-plugin -c server -- qat-plugin status")
    assert "waiting" in status
    services = _services(cluster)
    assert services.pop(busy) == {"sym", "asym"}
    assert list(services.values()) == [{"dc"}]
    assert cluster.node.is_open(holder)
    assert cluster.get("pod holder")["status"]["containerStatuses"] == before
    with step("that pod deleted, until its PF has the new services as well"):
        cluster.delete("holder")
        cluster.until_allocatable(dc=8)
    cluster.apply(workload("all", {DC: 8}))
    assert len(cluster.client("all")["devices"]) == 8


def test_the_nodes_own_file_wins(cluster: Cluster) -> None:
    cluster.install(AS_BOOTED, _OVERLAY)
    _change(cluster, **{"qat.conf": "ServicesEnabled=dc\n"})
    cluster.until_allocatable(dc=8)
    with step("a file for this node put into the ConfigMap, until it has won"):
        own, others = f"qat-{HOST_NAME}.conf", "qat-other.conf"
        _change(cluster, **{own: "ServicesEnabled=sym;asym\n", others: "ServicesEnabled=sym\n"})
        cluster.until_allocatable(cy=8)
    with step("that file taken out of it, until that of all nodes counts again"):
        cluster.run(
            "kubectl -n qat-plugin patch configmap qat-config --type=json -p "
            f"""'[{{"op": "remove", "path": "/data/{own}"}}]'"""
        )
        cluster.until_allocatable(dc=8)
