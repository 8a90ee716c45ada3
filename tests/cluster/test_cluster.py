"""A cluster in the guest: the README's commands, word for word, then what a user does with what they have installed.

The tests stand in an order: the first installs the base, the next ones use it; each later one installs another.
"""

import re
from collections.abc import Iterator
from typing import Final

import pytest

from cluster import control_plane, disk, installation, machine
from cluster.cluster_node import Cluster, step
from cluster.machine import Machine
from cluster.node import HOST_NAME
from cluster.readme import install_commands, look_commands
from cluster.static_pod import workload
from kernel.nodes import IN_A_VM
from kubelet.nodes import CY
from qat_server.simulation.node import Node, Pf

APPARMOR: Final = ("apparmor=1", "security=apparmor")
EIGHT: Final = Node(
    pfs=tuple(
        Pf(address=f"0000:{bus}:00.0", services="sym;asym", total_vfs=4, numa_node=numa)
        for numa, bus in enumerate(("6b", "e8"))
    )
)
AS_BOOTED: Final = Node(
    pfs=tuple(Pf(address=pf.address, numa_node=pf.numa_node, total_vfs=4, num_vfs=0) for pf in EIGHT.pfs)
)
"""Services that the driver chose, no VFs."""
MAP: Final = "kubectl -n qat-plugin patch configmap qat-config --type=merge -p"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := machine.why_not() or disk.why_not():
        pytest.skip(reason)
    image = disk.disk(programs=(*control_plane.PROGRAMS, "kubelet"))
    with Machine(image, memory=6144, words=APPARMOR) as guest:
        installation.lines.append(f"QEMU's start to the first command in the guest: {guest.booted():.1f} s")
        found = Cluster(guest)
        found.start()
        yield found


@pytest.fixture(scope="module")
def base(cluster: Cluster) -> Cluster:
    """The base, installed by the README's commands. Images are on the node: the first command is what has made them
    (disk.py calls deployments/images/build), and there is no registry to push them to."""
    images, *commands = (command.replace("NODE", HOST_NAME) for command in install_commands())
    assert images == "make images"
    cluster.node.devices(EIGHT)
    with step("the README's commands, until eight VFs are allocatable"):
        *before, describe = commands
        for command in before:
            cluster.run(command)
        cluster.until_rolled_out()
        cluster.until_allocatable(cy=8)
    described = cluster.run(describe)
    assert len(re.findall(rf"^ +{CY}: +8$", described, re.MULTILINE)) == 2, described
    return cluster


def test_a_pod_gets_two_vfs_and_one_that_asks_for_too_much_waits(base: Cluster) -> None:
    base.apply(workload("many", {CY: 9}))
    with step("a pod with two VFs applied, until it holds them open"):
        base.apply(workload("two", {CY: 2}))
        seen = base.client("two")
    addresses = [seen["environment"][name] for name in ("QAT0", "QAT1")]
    assert sorted(name for name in seen["environment"] if name.startswith("QAT")) == ["QAT0", "QAT1"]
    groups = {address: base.node.group(address) for address in addresses}
    assert {address: each["group"] for address, each in seen["devices"].items()} == groups
    assert seen["vfio"] == sorted(["vfio", *map(str, groups.values())])
    assert sorted(filter(base.node.is_open, base.node.vfs())) == sorted(addresses)

    def reason() -> str:
        conditions = base.get("pod many")["status"].get("conditions", ())
        return next((each["message"] for each in conditions if each.get("reason") == "Unschedulable"), "")

    assert f"Insufficient {CY}" in base.wait("the scheduler has looked at it", reason)
    assert base.get("pod many")["status"]["phase"] == "Pending"
    base.delete("two", "many")


def test_status_doctor_and_metrics(base: Cluster) -> None:
    base.apply(workload("one", {CY: 1}))
    holder = base.client("one")["environment"]["QAT0"]
    doctor, status = (base.run(command, check=False) for command in look_commands())
    assert "8 VFs on vfio-pci" in doctor
    assert "ready" in status.splitlines()[0]
    assert holder in status
    # Scraped at the pod's address, through the API server.
    path = f"/api/v1/namespaces/qat-plugin/pods/{base.plugin()}:9090/proxy/metrics"
    metrics = base.run(f"kubectl get --raw {path}")
    assert 'qat_plugin_devices{health="healthy",resource="cy"} 8.0' in metrics
    assert "qat_plugin_helper_up 1.0" in metrics
    base.delete("one")


UPGRADES: Final = {
    "rolling update of the DaemonSet": "kubectl -n qat-plugin rollout restart ds/qat-plugin",
    "the plugin's pod deleted": "kubectl -n qat-plugin delete pod -l app.kubernetes.io/name=qat-plugin",
}


@pytest.mark.parametrize("event", UPGRADES)
def test_a_running_pod_keeps_its_vfs(base: Cluster, event: str) -> None:
    base.apply(workload("holder", {CY: 2}))
    environment = base.client("holder")["environment"]
    held = {environment["QAT0"], environment["QAT1"]}
    before = base.get("pod holder")["status"]["containerStatuses"]
    old = base.plugin()
    with step(f"{event}, until eight are allocatable again"):
        base.run(UPGRADES[event])
        base.wait("another pod is there", lambda: base.plugin() != old)
        base.until_rolled_out()
        base.node.resources(f"{CY}=8")
        base.until_allocatable(cy=8)
    assert base.get("pod holder")["status"]["containerStatuses"] == before
    assert all(map(base.node.is_open, held))
    base.apply(workload("late", {CY: 2}))
    environment = base.client("late")["environment"]
    assert not {environment["QAT0"], environment["QAT1"]} & held
    base.delete("holder", "late")


def test_provisioning_from_pfs_as_booted(base: Cluster) -> None:
    """From no VFs to running pods; a ConfigMap's change waits for a pod, then happens; the node's own file wins."""
    cluster = base
    cluster.remove("deployments/base")
    cluster.node.devices(AS_BOOTED)
    assert cluster.guest.run("ls -d /sys/bus/pci/devices/*/physfn", check=False).count("physfn\n") == 0
    with step("the provisioning overlay applied to PFs as booted, until eight VFs are allocatable"):
        cluster.run("kubectl apply -k deployments/overlays/qat_initcontainer")
        cluster.until_rolled_out()
        cluster.until_allocatable(cy=8)
    for pod in cluster.get("pods --all-namespaces")["items"]:
        for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
            context = container.get("securityContext", {})
            assert not context.get("privileged")
            assert pod["metadata"]["namespace"] != "qat-plugin" or context["capabilities"] == {"drop": ["ALL"]}

    cluster.apply(workload("holder", {CY: 1}))
    holder = cluster.client("holder")["environment"]["QAT0"]
    busy = cluster.guest.run(f"basename $(readlink -f /sys/bus/pci/devices/{holder}/physfn)").strip()
    services = "cat /sys/bus/pci/devices/{}/qat/cfg_services"
    with step("ConfigMap changed while a pod holds a VF, until the other PF has it (the kubelet's mount is late)"):
        cluster.run(f"""{MAP} '{{"data": {{"qat.conf": "ServicesEnabled=dc\\n"}}}}'""")
        cluster.until_allocatable(cy=4, dc=4)
    assert "waiting" in cluster.run("kubectl -n qat-plugin exec ds/qat-plugin -c server -- qat-plugin status")
    assert cluster.guest.run(services.format(busy)).strip() == "sym;asym"
    assert cluster.node.is_open(holder)
    with step("the pod deleted, until its PF has been changed as well"):
        cluster.delete("holder")
        cluster.until_allocatable(dc=8)
    with step("a file of the node's own put in, until it has won"):
        own = f"qat-{HOST_NAME}.conf"
        cluster.run(f"""{MAP} '{{"data": {{"{own}": "ServicesEnabled=sym;asym\\n"}}}}'""")
        cluster.until_allocatable(cy=8)
    cluster.remove("deployments/overlays/qat_initcontainer")


def test_in_a_vm_vfs_without_pfs_are_served(base: Cluster) -> None:
    base.remove("deployments/base")
    base.node.devices(IN_A_VM)
    with step("the overlay for VMs applied, until three VFs are allocatable"):
        base.run("kubectl apply -k deployments/overlays/vm")
        base.until_rolled_out()
        base.until_allocatable(generic=3)
    base.remove("deployments/overlays/vm")
