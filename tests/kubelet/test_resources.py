"""What the kubelet has, and what it gives to containers: capacity, the topology policies, the preferred allocation."""

import asyncio
import subprocess
import time
from pathlib import Path

import pytest

from kubelet.answers import AdmissionError, ContainerAllocation, TopologyAffinityError
from kubelet.measured import Timed
from kubelet.nodes import CY, DC, EVERY_ALLOCATABLE, EVERY_DRIVER, EVERY_RESOURCE, LARGE, ONE_PF, SYM_DC, TWO_NODES
from kubelet.production import SERVER_ID, SOCKETS, ProductionNode, production_node
from kubelet.real_kubelet import RealKubelet
from qat_server.kubelet.registration.directories import Registration
from qat_shared.pci import PciAddress
from qat_simulation.kubelet.topology import TopologyPolicy

NODE_0, NODE_1 = {"6b", "70"}, {"e8"}  # the buses of TWO_NODES


@pytest.mark.usefixtures("as_in_production")
async def test_the_processes_may_no_more_than_in_production(registration: Registration) -> None:
    async with production_node(ONE_PF, registration=registration) as node:
        await node.start({CY: 4})
        assert node.helper is not None
        assert node.server is not None
        for pid, uid in ((node.helper.pid, 0), (node.server.pid, SERVER_ID)):
            found = facts(pid)
            assert set(found["Uid"].split()) == {str(uid)}
            assert set(found["Gid"].split()) == {str(SERVER_ID)}
            assert found["Groups"] == ""
            assert {int(found[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
            assert found["NoNewPrivs"] == "1"
        for name in ("device-plugins", "pod-resources", "plugins_registry"):
            status = (node.kubelet_directory / name).stat()
            assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 0, 0o750)
        status = node.sockets.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, SERVER_ID, 0o770)
        as_server = ["nsenter", f"--target={node.server.pid}", "--mount", "--", "setpriv", f"--reuid={SERVER_ID}"]
        as_server += [f"--regid={SERVER_ID}", "--clear-groups", "--", "ls"]
        for path, may in ((node.sockets, False), (node.server_kubelet_directory / SOCKETS[registration], True)):
            listing = await asyncio.create_subprocess_exec(*as_server, path, stdout=subprocess.DEVNULL)
            assert (await listing.wait() == 0) == may


async def test_every_resource_has_its_devices(registration: Registration) -> None:
    async with production_node(EVERY_RESOURCE, EVERY_DRIVER, registration=registration) as node:
        async with Timed("server's start to allocatable, 17 VFs to be bound first", 1, registration) as timed:
            await timed.add(await node.start(EVERY_ALLOCATABLE))
        assert await node.kubelet.capacity() == EVERY_ALLOCATABLE
        assert await node.kubelet.allocatable() == EVERY_ALLOCATABLE
        assert await node.kubelet.allocatable_free() == EVERY_ALLOCATABLE
        by_numa = {
            name: {device.id[:7]: device.numa_nodes for device in devices}
            for name, devices in (await node.kubelet.devices()).items()
        }
        assert by_numa[CY] == {"0000:6b": (0,), "0000:70": (1,)}
        assert by_numa[SYM_DC] == {"0001:e8": (0,)}
        pod = await node.kubelet.allocate("all", [("main", name, 1) for name in EVERY_ALLOCATABLE])
        assert set(pod.containers["main"].by_resource) == set(EVERY_ALLOCATABLE)


@pytest.mark.parametrize("policy", TopologyPolicy)
async def test_each_container_is_told_its_own_devices(policy: TopologyPolicy) -> None:
    async with production_node(EVERY_RESOURCE, EVERY_DRIVER, policy) as node:
        await node.start(EVERY_ALLOCATABLE)
        asked = [("crypto", CY, 3), ("more", CY, 1), ("packer", DC, 2), ("both", SYM_DC, 1)]
        pod = await node.kubelet.allocate("pod", asked)
        for name, resource, number in asked:
            container = pod.containers[name]
            assert len(container.by_resource[resource]) == number
            assert_told(node, container)
            assert await node.kubelet.restart_container("pod", name) == container
        assert len(set(pod.devices)) == 7


async def test_igb_uio_gives_uio_nodes_and_mounts() -> None:
    async with production_node(ONE_PF, ("-dpdk-driver", "igb_uio")) as node:
        await node.start({CY: 4})
        main = (await node.kubelet.allocate("pod", [("main", CY, 2)])).containers["main"]
        names = [path.removeprefix("/dev/") for path in main.device_nodes]
        assert len(names) == 2
        assert all(name.startswith("uio") for name in names)
        assert [(mount.host_path, mount.container_path) for mount in main.mounted] == [
            (f"/sys/class/uio/{name}/device",) * 2 for name in sorted(names)
        ]


@pytest.mark.parametrize(
    ("policy", "number", "buses"),
    [
        (TopologyPolicy.NONE, 3, NODE_0 | NODE_1),
        (TopologyPolicy.BEST_EFFORT, 3, NODE_0),
        (TopologyPolicy.BEST_EFFORT, 8, NODE_0),
        (TopologyPolicy.BEST_EFFORT, 9, NODE_0 | NODE_1),
        (TopologyPolicy.RESTRICTED, 8, NODE_0),
        (TopologyPolicy.RESTRICTED, 9, NODE_0 | NODE_1),
        (TopologyPolicy.SINGLE_NUMA_NODE, 8, NODE_0),
        (TopologyPolicy.SINGLE_NUMA_NODE, 9, None),
    ],
)
async def test_the_numa_nodes_that_the_policy_wants(
    policy: TopologyPolicy, number: int, buses: set[str] | None
) -> None:
    async with production_node(TWO_NODES, ("--allocation-policy=balanced",), policy) as node:
        await node.start({CY: 12})
        if buses is None:
            with pytest.raises(TopologyAffinityError):
                await node.kubelet.allocate("pod", [("main", CY, number)])
            return
        main = (await node.kubelet.allocate("pod", [("main", CY, number)])).containers["main"]
        assert {id_[5:7] for id_ in main.devices} == buses
        assert_told(node, main)


async def test_restricted_refuses_what_is_left_on_two_numa_nodes() -> None:
    async with production_node(TWO_NODES, policy=TopologyPolicy.RESTRICTED) as node:
        await node.start({CY: 12})
        await node.kubelet.allocate("a", [("main", CY, 6)])
        await node.kubelet.allocate("b", [("main", CY, 2)])
        await node.kubelet.allocate("c", [("main", CY, 2)])
        await node.kubelet.free("b")
        with pytest.raises(TopologyAffinityError):  # two on each node are free
            await node.kubelet.allocate("d", [("main", CY, 4)])


@pytest.mark.parametrize(
    ("ours", "policy", "first", "second"),
    [
        ("balanced", TopologyPolicy.NONE, ("6b:00.1", "70:00.1", "e8:00.1"), ("6b:00.2", "70:00.2")),
        ("packed", TopologyPolicy.NONE, ("6b:00.1", "6b:00.2", "6b:00.3"), ("6b:00.4", "70:00.1")),
        ("balanced", TopologyPolicy.BEST_EFFORT, ("6b:00.1", "6b:00.2", "70:00.1"), ("6b:00.3", "70:00.2")),
        ("packed", TopologyPolicy.SINGLE_NUMA_NODE, ("6b:00.1", "6b:00.2", "6b:00.3"), ("6b:00.4", "70:00.1")),
    ],
)
async def test_the_preferred_devices_are_given(
    ours: str, policy: TopologyPolicy, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    async with production_node(TWO_NODES, (f"--allocation-policy={ours}",), policy) as node:
        await node.start({CY: 12})
        for pod, wanted in (("first", first), ("second", second)):
            given = await node.kubelet.allocate(pod, [("main", CY, len(wanted))])
            assert sorted(id_.removeprefix("0000:") for id_ in given.devices) == sorted(wanted), pod


async def test_1024_vfs_and_64_pods_of_4() -> None:
    async with production_node(LARGE, ("--max-num-devices=1024",)) as node:
        async with Timed("server's start to allocatable, 1024 VFs to be bound first", 2) as timed:
            await timed.add(await node.start({CY: 1024}))
        async with Timed("server's start to allocatable, 1024 VFs bound already", 2) as timed:
            for _ in range(3):
                await node.stop_server()
                await node.wait({CY: 0})
                await timed.add(await node.start_again({CY: 1024}))
        async with Timed("64 pods of 4 of 1024 VFs, all at once", 2) as timed:
            began = time.monotonic()
            pods = await asyncio.gather(*(node.kubelet.allocate(f"pod-{n}", [("main", CY, 4)]) for n in range(64)))
            await timed.add(time.monotonic() - began)
        assert len({id_ for pod in pods for id_ in pod.devices}) == 256
        for pod in pods:
            assert_told(node, pod.containers["main"])
        with pytest.raises(AdmissionError, match="Requested: 769, Available: 768"):
            await node.kubelet.allocate("greedy", [("main", CY, 769)])


def assert_told(node: ProductionNode[RealKubelet], container: ContainerAllocation) -> None:
    """The environment names the container's devices from QAT0 on, and the nodes are those of their IOMMU groups."""
    addresses = sorted(PciAddress.parse(id_) for id_ in container.devices)
    assert container.envs == {f"QAT{number}": str(address) for number, address in enumerate(addresses)}
    state = node.kernel.snapshot()
    groups = {f"/dev/vfio/{state[address].iommu_group}" for address in addresses}
    assert len(groups) == len(addresses)
    assert set(container.device_nodes) == {*groups, "/dev/vfio/vfio"}
    assert all((each.host_path, each.permissions) == (each.container_path, "rw") for each in container.nodes)
    assert container.mounts == ()


def facts(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
