"""The plugin's pod is replaced, in each way in which a cluster does that, while a pod holds its VFs: that one keeps
them, what is allocatable returns, and new pods are served."""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import pytest

from cluster import installation
from cluster.cluster_node import Cluster, step
from cluster.cluster_nodes import EIGHT
from cluster.node import PYTHON
from cluster.static_pod import workload
from deployments import rendered
from kernel.machine import PROJECT
from kubelet.nodes import CY

_PLUGIN: Final = "kubectl -n qat-plugin"
_NEXT: Final = "helper=qat-plugin.invalid/helper:next server=qat-plugin.invalid/server:next"
EVENTS: Final = {
    "rollout restart": f"{_PLUGIN} rollout restart ds/qat-plugin",
    "new images": f"{_PLUGIN} set image ds/qat-plugin {_NEXT}",
    "the pod deleted": f"{_PLUGIN} delete --wait=false pod -l app.kubernetes.io/name=qat-plugin",
}


@contextlib.contextmanager
def _watched(cluster: Cluster, name: str) -> Iterator[None]:
    """Show how long fewer than eight were allocatable meanwhile, by the kubelet, asked again and again."""
    log = cluster.guest.share / "allocatable"
    log.unlink(missing_ok=True)
    command = f"{PYTHON} {PROJECT}/tests/cluster/guest/pod_resources.py --watch {CY}"
    cluster.guest.run(f"systemd-run --unit=watch -p StandardOutput=file:/run/host/{log.name} {command} 2>&1")
    try:
        cluster.guest.until("it is watched", f"grep -q ' 8$' /run/host/{log.name}")
        yield
        cluster.guest.until("eight are seen to be back", f"tail -n 1 /run/host/{log.name} | grep ' 8$'")
    finally:
        cluster.guest.run("systemctl stop watch")
    seen = [(float(when), int(number)) for when, number in map(str.split, log.read_text().splitlines())]
    gone = sum(after - before for (before, number), (after, _) in pairwise(seen) if number < 8)
    installation.lines.append(f"{name}: fewer than eight allocatable for {gone:.1f} s")


def _images(cluster: Cluster, pod: str) -> list[str]:
    """As asked for: what the status says is any name that the image has."""
    spec = cluster.get(f"pod -n qat-plugin {pod}")["spec"]
    return [each["image"] for each in (*spec["initContainers"], *spec["containers"])]


@pytest.mark.parametrize("event", EVENTS)
def test_a_running_pod_keeps_its_vfs_and_allocatable_returns(cluster: Cluster, event: str) -> None:
    cluster.install(EIGHT)
    for container in ("helper", "server"):
        name = rendered.container(rendered.pod_spec(rendered.render("base")), container)["image"]
        cluster.guest.run(f"ctr -n k8s.io images tag --force {name} {name.rpartition(':')[0]}:next")
    cluster.apply(workload("holder", {CY: 2}))
    environment = cluster.client("holder")["environment"]
    held = {environment["QAT0"], environment["QAT1"]}
    before = cluster.get("pod holder")["status"]["containerStatuses"]
    old = cluster.plugin()
    old_images = _images(cluster, old)
    with _watched(cluster, event), step(f"{event}, until another pod is ready and the node's status says eight"):
        cluster.run(EVENTS[event])
        new = cluster.until_replaced(old)
        cluster.until_allocatable(cy=8)
    assert (_images(cluster, new) != old_images) == (event == "new images")
    assert cluster.get("pod holder")["status"]["containerStatuses"] == before
    assert all(map(cluster.node.is_open, held))
    assert cluster.node.resources()["pods"]["holder"] == {"main": {CY: sorted(held)}}
    cluster.apply(workload("late", {CY: 6}))
    seen = cluster.client("late")
    assert len(seen["devices"]) == 6
    assert not set(seen["devices"]) & held
