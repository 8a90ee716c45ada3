"""What dies and comes back while a pod holds its VFs: it keeps them, and what is allocatable returns."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from msgspec import Struct

from cluster import installation
from cluster.installation import Installation
from cluster.node import KubeletNode
from cluster.static_pod import workload
from deployments import rendered
from kernel.nodes import TWO_SMALL
from kubelet.nodes import CY


class Holder(Struct, frozen=True):
    """A pod that has two VFs open."""

    pid: int
    addresses: tuple[str, ...]


@pytest.fixture(scope="module")
def holder(installed: Installation) -> Iterator[Holder]:
    installed.plugin(TWO_SMALL, rendered.render("base"))
    node = installed.node
    node.resources(f"{CY}=4")
    node.apply(workload("holder", {CY: 2}))
    environment = node.client("holder")["environment"]
    yield Holder(node.pid("holder", "main"), (environment["QAT0"], environment["QAT1"]))
    installed.clear()


def _replaced(node: KubeletNode) -> None:
    """As a rolling update does: the old pod ends, then another starts."""
    manifests = rendered.render("base")
    (daemon_set,) = rendered.of_kind(manifests, "DaemonSet")
    annotations = daemon_set["spec"]["template"]["metadata"]["annotations"]
    annotations["kubectl.kubernetes.io/restartedAt"] = "2026-01-01T00:00:00Z"
    old = node.pods()["qat-plugin"]["metadata"]["uid"]
    node.plugin(manifests)
    node.until(
        "another pod is there", lambda pods: "qat-plugin" in pods and pods["qat-plugin"]["metadata"]["uid"] != old
    )


def _killed(name: str) -> Callable[[KubeletNode], None]:
    def kill(node: KubeletNode) -> None:
        before = node.container("qat-plugin", name)
        node.guest.run(f"kill -9 {node.pid('qat-plugin', name)}")

        def again(_: Any) -> bool:
            after = node.container("qat-plugin", name)
            return after["restartCount"] > before["restartCount"] and "running" in after["state"]

        node.until(f"{name} runs again", again)

    return kill


def _unit_killed(name: str) -> Callable[[KubeletNode], None]:
    def kill(node: KubeletNode) -> None:
        pid = node.guest.run(f"systemctl show -P MainPID {name}").strip()
        assert pid != "0"
        # Its main process alone: systemctl kill would end the shims, and with them the containers.
        node.guest.run(f"kill -9 {pid}")
        node.guest.until(
            f"{name} runs again", f"systemctl is-active {name} && [[ $(systemctl show -P MainPID {name}) != {pid} ]]"
        )
        node.until_healthy()

    return kill


EVENTS: Final[dict[str, Callable[[KubeletNode], None]]] = {
    "the plugin's pod replaced": _replaced,
    "helper container killed": _killed("helper"),
    "server container killed": _killed("server"),
    "kubelet killed": _unit_killed("kubelet"),
    "containerd killed": _unit_killed("containerd"),
}


@pytest.mark.parametrize("event", EVENTS)
def test_a_running_pod_keeps_its_vfs_and_allocatable_returns(holder: Holder, node: KubeletNode, event: str) -> None:
    began = time.monotonic()
    EVENTS[event](node)
    found = node.resources(f"{CY}=4")
    installation.lines.append(f"{event}, to four allocatable again: {time.monotonic() - began:.1f} s")
    assert found["pods"]["holder-node"] == {"main": {CY: sorted(holder.addresses)}}
    assert node.pid("holder", "main") == holder.pid
    assert all(map(node.is_open, holder.addresses))
    node.until_ready("qat-plugin")
    # New pods are served, and get others.
    node.apply(workload("late", {CY: 2}))
    environment = node.client("late")["environment"]
    assert not {environment["QAT0"], environment["QAT1"]} & set(holder.addresses)
