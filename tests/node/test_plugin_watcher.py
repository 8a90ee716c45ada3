"""The other way to register, end to end: both processes, and a kubelet that finds the server's sockets."""

import json
import os
import signal
from collections.abc import Callable

from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import RunningNode, running_node

CY, DC = "qat.intel.com/cy", "qat.intel.com/dc"
TWO_PFS = Node(
    pfs=(
        Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, numa_node=0),
        Pf(address="0000:70:00.0", services="dc", total_vfs=2, numa_node=1),
    )
)
WATCHER = ("--registration=plugin-watcher",)


def sockets(node: RunningNode) -> list[str]:
    directory = node.kubelet.directory / "plugins_registry" / "qat.intel.com"
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


async def test_from_start_to_pods_and_restarts_without_the_kubelets_socket(
    helper_policy: Callable[[str], None],
) -> None:
    helper_policy(
        'operations = ["BindDriver", "ReadHeartbeat", "PrepareSocketDirectory"]\ndirectories = ["plugins-registry"]\n'
    )
    async with running_node(TWO_PFS, WATCHER) as node:
        node.start_helper()
        node.start_server()
        expected = {CY: 4, DC: 2}
        await node.until("all is served", lambda: node.kubelet.allocatable() == expected)
        await node.until_status("ready", lambda status: status.ready)
        await node.until("settled", lambda: node.kubelet.settled)
        pod = await node.kubelet.allocate("pod", [("main", CY, 2), ("side", DC, 1)])
        assert [len(each.envs) for each in pod.containers.values()] == [2, 1]
        await node.kubelet.restart(kill=True)
        await node.until("registered with no action", lambda: node.kubelet.allocatable() == expected)
        first = sockets(node)
        await node.stop_server(signal.SIGKILL)
        await node.until("nothing is served", lambda: node.kubelet.allocatable() == {CY: 0, DC: 0})
        assert sockets(node) == first, "a killed server leaves them"
        node.start_server()
        await node.until("all is served again", lambda: node.kubelet.allocatable() == expected)
        second = sockets(node)
        assert len(second) == 2
        assert not set(first) & set(second), "each life has its own names"
        assert node.kubelet.devices_of("pod") == set(pod.devices)
        assert await node.stop_server() == 0
        assert sockets(node) == []
        left = os.listdir(node.kubelet.directory / "device-plugins")
        assert sorted(left) == ["kubelet.sock", "kubelet_internal_checkpoint"]
        records = [json.loads(line) for line in node.audit_lines()]
    prepared = [each for each in records if each.get("operation") == "PrepareSocketDirectory"]
    assert {each["arguments"]["directory"] for each in prepared} == {"plugins-registry"}
    opened = [each for each in records if each.get("operation") in ("RegisterResource", "OpenPodResources")]
    assert {(each["event"], each["operation"]) for each in opened} <= {("refused", "OpenPodResources")}


async def test_what_the_policy_forbids_is_the_reason_shown(helper_policy: Callable[[str], None]) -> None:
    helper_policy('directories = ["device-plugins"]\n')
    async with running_node(TWO_PFS, WATCHER) as node:
        node.start_helper()
        node.start_server()
        await node.until_status(
            "it says why",
            lambda status: any("policy does not allow plugins-registry" in each for each in status.not_ready),
        )
        assert not (node.kubelet.directory / "plugins_registry" / "qat.intel.com").exists()
