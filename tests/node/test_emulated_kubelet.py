"""The emulated kubelet behaves as the real one was observed to, its faults included."""

import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from qat_server.helper_client.client import HelperError
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.allocation import AllocationPolicy
from qat_server.kubelet.device import Device, Holder
from qat_server.kubelet.device_plugin import DevicePlugin
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated import podresources_v1_pb2 as resources_pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import (
    RegistrationStub,
    add_DevicePluginServicer_to_server,
)
from qat_server.kubelet.generated.podresources_v1_pb2_grpc import PodResourcesListerStub
from qat_server.kubelet.pod_resources import PodResourcesError, held_devices
from qat_server.kubelet.sockets import grpc_socket
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress
from qat_simulation.kubelet.kubelet import (
    AdmissionError,
    Hostility,
    Kubelet,
    KubeletPanicError,
    TopologyAffinityError,
    TopologyPolicy,
)
from support.conditions import until
from support.endpoints import NoUsage
from support.kubelet_sockets import DirectHelper

CY = "qat.intel.com/cy"


def address(number: int, numa_node: int = 0) -> PciAddress:
    return PciAddress(0, 0x6B + numa_node, 0, number)


def device(number: int, reason: str = "", numa_node: int = 0) -> Device:
    return Device(address(number, numa_node), None, numa_node, (f"/dev/vfio/{number}",), (), reason)


class Plugin(DevicePlugin):
    """The server's plugin, with faults on demand."""

    def __init__(self) -> None:
        super().__init__("cy", AllocationPolicy.NONE, Counters(), NoUsage())
        self.empty = False
        self.before_allocate: Callable[[], None] = lambda: None
        self.during_allocate: Callable[[], None] = lambda: None
        self.prefers: list[str] | None = None
        self.preferred: list[pb.ContainerPreferredAllocationRequest] = []

    async def Allocate(
        self, request: pb.AllocateRequest, context: "grpc.aio.ServicerContext[object, object]"
    ) -> pb.AllocateResponse:
        self.before_allocate()
        answer = pb.AllocateResponse() if self.empty else await super().Allocate(request, context)
        self.during_allocate()
        return answer

    async def GetPreferredAllocation(
        self, request: pb.PreferredAllocationRequest, context: "grpc.aio.ServicerContext[object, object]"
    ) -> pb.PreferredAllocationResponse:
        self.preferred.extend(request.container_requests)
        if self.prefers is None:
            return await super().GetPreferredAllocation(request, context)
        answer = pb.PreferredAllocationResponse()
        answer.container_responses.add(deviceIDs=self.prefers)
        return answer


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Node:
    """A kubelet and the plugins that a test serves on it."""

    def __init__(self, kubelet: Kubelet, clock: Clock) -> None:
        self.kubelet = kubelet
        self.clock = clock

    async def register(self, endpoint: str, resource: str = CY, version: str = "v1beta1") -> None:
        async with grpc.aio.insecure_channel(f"unix:{self.kubelet.plugin_directory}/kubelet.sock") as channel:
            request = pb.RegisterRequest(version=version, endpoint=endpoint, resource_name=resource)
            await RegistrationStub(channel).Register(request, timeout=60)

    @asynccontextmanager
    async def plugin(
        self, devices: Sequence[Device] = (), endpoint: str = "cy.sock", registered: bool = True
    ) -> AsyncIterator[Plugin]:
        plugin = Plugin()
        plugin.update(devices)
        server = grpc.aio.server()
        add_DevicePluginServicer_to_server(plugin, server)
        path = self.kubelet.plugin_directory / endpoint
        path.parent.mkdir(exist_ok=True)
        await grpc_socket.start(server, path, 0o660)
        try:
            if registered:
                await self.register(endpoint)
                await self.kubelet.wait_for(lambda: self.kubelet.capacity().get(CY) == len(devices))
            yield plugin
        finally:
            await server.stop(None)


@asynccontextmanager
async def a_node(
    directory: Path, policy: TopologyPolicy = TopologyPolicy.NONE, dial_timeout: float = 120
) -> AsyncIterator[Node]:
    clock = Clock()
    kubelet = Kubelet(directory, policy, clock=clock, dial_timeout=dial_timeout)
    await kubelet.start()
    try:
        yield Node(kubelet, clock)
    finally:
        await kubelet.stop()


@pytest.fixture
async def node(directory: Path) -> AsyncIterator[Node]:
    async with a_node(directory) as made:
        yield made


FOUR = [device(number) for number in range(4)]


async def test_its_directories_are_closed_to_other_users(node: Node) -> None:
    for each in (node.kubelet.plugin_directory, node.kubelet.directory / "pod-resources"):
        assert stat.S_IMODE(each.stat().st_mode) == 0o750


@pytest.mark.parametrize(
    ("resource", "version", "error"),
    [
        (CY, "v1", 'requested API version "v1" is not supported by kubelet. Supported version is ["v1beta1"]'),
        ("cy", "v1beta1", 'the ResourceName "cy" is invalid'),
        ("kubernetes.io/cy", "v1beta1", 'the ResourceName "kubernetes.io/cy" is invalid'),
        ("qat.intel.com/a;b", "v1beta1", 'the ResourceName "qat.intel.com/a;b" is invalid'),
    ],
    ids=["version", "no domain", "native", "bad name"],
)
async def test_a_bad_registration_is_refused(node: Node, resource: str, version: str, error: str) -> None:
    await refused(node, resource, version, error)


async def test_a_registration_without_an_endpoint_is_refused(directory: Path) -> None:
    async with a_node(directory, dial_timeout=0.2) as node:
        await refused(node, CY, "v1beta1", "failed to dial device plugin: context deadline exceeded")


async def refused(node: Node, resource: str, version: str, error: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await node.register("nobody.sock", resource, version)
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert caught.value.details() == error
    assert [each.error for each in node.kubelet.registrations] == [error]
    assert node.kubelet.capacity() == {}


async def test_only_the_exact_word_healthy_means_healthy(node: Node) -> None:
    async with node.plugin([*FOUR, device(5, "it is bad")]):
        assert node.kubelet.capacity() == {CY: 5}
        assert node.kubelet.allocatable() == {CY: 4}


async def test_a_lost_plugin_leaves_capacity_for_five_minutes(node: Node) -> None:
    async with node.plugin(FOUR):
        pass
    await node.kubelet.wait_for(lambda: node.kubelet.allocatable() == {CY: 0})
    node.clock.now += 299
    assert node.kubelet.capacity() == {CY: 4}
    node.clock.now += 2
    assert node.kubelet.capacity() == {}
    assert node.kubelet.allocatable() == {}


async def test_the_end_of_an_old_stream_drops_the_new_client(node: Node) -> None:
    async with node.plugin(FOUR, "old.sock") as old, node.plugin(FOUR[:3], "new.sock") as new:
        old.withdraw()
        await node.kubelet.wait_for(lambda: node.kubelet.allocatable() == {CY: 0})
        await until(lambda: new.streams.ended == 1)


async def test_a_restart_removes_top_level_sockets_only_and_keeps_pods(node: Node) -> None:
    async with node.plugin(FOUR, "qat.intel.com/cy.sock"), node.plugin([], "top.sock", registered=False):
        got = await node.kubelet.allocate("pod", [("main", CY, 2)])
        await node.kubelet.restart()
        assert sorted(os.listdir(node.kubelet.plugin_directory)) == [
            "kubelet.sock",
            "kubelet_internal_checkpoint",
            "qat.intel.com",
        ]
        assert node.kubelet.capacity() == {CY: 0}
        await node.register("qat.intel.com/cy.sock")
        await node.kubelet.wait_for(lambda: node.kubelet.allocatable() == {CY: 4})
        assert node.kubelet.devices_of("pod") == set(got.devices)
        assert node.kubelet.allocatable_free() == {CY: 2}


@pytest.mark.parametrize("hostility", [Hostility.NONE, Hostility.CLOSE])
async def test_only_a_killed_one_leaves_its_socket_behind(node: Node, hostility: Hostility) -> None:
    path = node.kubelet.plugin_directory / "kubelet.sock"
    node.kubelet.hostility = hostility
    await node.kubelet.restart()
    await node.kubelet.stop()
    assert not path.exists()
    await node.kubelet.start()
    await node.kubelet.stop(kill=True)
    with pytest.raises(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


async def test_a_corrupt_checkpoint_counts_as_empty(node: Node) -> None:
    async with node.plugin(FOUR, "qat.intel.com/cy.sock"):
        await node.kubelet.allocate("pod", [("main", CY, 2)])
        await node.kubelet.stop(kill=True)
        (node.kubelet.plugin_directory / "kubelet_internal_checkpoint").write_bytes(b"{")
        await node.kubelet.start()
        assert node.kubelet.capacity() == {}
        assert node.kubelet.devices_of("pod") == set()


async def test_each_container_gets_its_own_devices(node: Node) -> None:
    async with node.plugin(FOUR):
        got = await node.kubelet.allocate("ns/pod", [("one", CY, 1), ("two", CY, 2)])
        one, two = got.containers["one"], got.containers["two"]
        assert one.envs == {"QAT0": str(address(0))}
        assert two.envs == {"QAT0": str(address(1)), "QAT1": str(address(2))}
        assert two.device_nodes == ("/dev/vfio/1", "/dev/vfio/2")
        assert node.kubelet.devices_of("ns/pod") == {str(address(number)) for number in range(3)}
        with pytest.raises(
            AdmissionError, match=r"devices unavailable for qat.intel.com/cy. Requested: 2, Available: 1"
        ):
            await node.kubelet.allocate("other", [("main", CY, 2)])
        node.kubelet.free("ns/pod")
        assert node.kubelet.allocatable_free() == {CY: 4}


async def test_preferred_devices_are_allocated_and_unknown_ids_ignored(node: Node) -> None:
    async with node.plugin(FOUR) as plugin:
        plugin.prefers = ["nothing", str(address(3))]
        got = await node.kubelet.allocate("one", [("main", CY, 1)])
        assert got.devices == (str(address(3)),)
        plugin.prefers = ["nothing"]
        assert len((await node.kubelet.allocate("two", [("main", CY, 2)])).devices) == 2
        [first, second] = plugin.preferred
        assert len(first.available_deviceIDs) == 4
        assert sorted(second.available_deviceIDs) == [str(address(number)) for number in range(3)]


async def test_a_refused_allocation_refuses_the_pod_and_restores_its_devices(node: Node) -> None:
    async with node.plugin(FOUR) as plugin:
        plugin.before_allocate = lambda: plugin.update([device(number, "it broke just now") for number in range(4)])
        with pytest.raises(AdmissionError) as caught:
            await node.kubelet.allocate("pod", [("main", CY, 2)])
        assert str(caught.value).startswith("Allocate failed due to rpc error: code = FailedPrecondition desc = QAT")
        assert str(caught.value).endswith("it broke just now, which is unexpected")
        plugin.update(FOUR)
        await node.kubelet.wait_for(lambda: node.kubelet.allocatable_free() == {CY: 4})


async def test_an_empty_answer_refuses_the_pod_and_leaks_its_devices(node: Node) -> None:
    async with node.plugin(FOUR) as plugin:
        plugin.empty = True
        with pytest.raises(AdmissionError, match="no containers return in allocation response"):
            await node.kubelet.allocate("pod", [("main", CY, 3)])
        plugin.empty = False
        assert node.kubelet.allocatable_free() == {CY: 1}


async def test_a_device_dropped_while_it_is_allocated_crashes_the_kubelet(node: Node) -> None:
    async with node.plugin(FOUR[:1]) as plugin:
        stream_saw: list[int] = []

        def drop() -> None:
            plugin.update([])
            node.kubelet._manager.listed(CY, [])  # as if the kubelet had read the new list before the answer
            stream_saw.append(1)

        plugin.during_allocate = drop
        with pytest.raises(KubeletPanicError, match="nil dereference"):
            await node.kubelet.allocate("pod", [("main", CY, 1)])
        assert stream_saw


async def test_readmission_with_a_device_that_left_the_list_crashes_the_kubelet(directory: Path) -> None:
    async with a_node(directory, TopologyPolicy.BEST_EFFORT) as node, node.plugin(FOUR) as plugin:
        got = await node.kubelet.allocate("pod", [("main", CY, 1)])
        assert (await node.kubelet.allocate("pod", [("main", CY, 1)])).devices == got.devices
        plugin.update([each for each in FOUR if str(each.address) not in got.devices])
        await node.kubelet.wait_for(lambda: node.kubelet.capacity() == {CY: 3})
        with pytest.raises(KubeletPanicError):
            await node.kubelet.allocate("pod", [("main", CY, 1)])


TWO_NODES = [device(number, numa_node=numa) for numa in (0, 1) for number in range(2)]
TOPOLOGY = [
    (TopologyPolicy.BEST_EFFORT, 1, 2, None),
    (TopologyPolicy.BEST_EFFORT, 2, 3, None),
    (TopologyPolicy.RESTRICTED, 1, 2, None),
    (TopologyPolicy.RESTRICTED, 2, 3, None),
    (TopologyPolicy.SINGLE_NUMA_NODE, 1, 2, None),
    (TopologyPolicy.SINGLE_NUMA_NODE, 2, 3, "Resources cannot be allocated with Topology locality"),
]


@pytest.mark.parametrize(("policy", "numa_nodes", "number", "error"), TOPOLOGY)
async def test_topology_policies(
    directory: Path, policy: TopologyPolicy, numa_nodes: int, number: int, error: str | None
) -> None:
    async with a_node(directory, policy) as node, node.plugin(TWO_NODES):
        if error is not None:
            with pytest.raises(TopologyAffinityError, match=error):
                await node.kubelet.allocate("pod", [("main", CY, number)])
            return
        got = await node.kubelet.allocate("pod", [("main", CY, number)])
        assert len({PciAddress.parse(each).bus for each in got.devices}) == numa_nodes
        assert len(got.devices) == number


async def test_a_fragmented_node_is_refused_when_restricted(directory: Path) -> None:
    async with a_node(directory, TopologyPolicy.RESTRICTED) as node, node.plugin(TWO_NODES) as plugin:
        for pod, numa in (("a", 0), ("b", 1)):
            plugin.update([each for each in TWO_NODES if each.numa_node == numa])
            await node.kubelet.wait_for(lambda: node.kubelet.capacity() == {CY: 2})
            await node.kubelet.allocate(pod, [("main", CY, 1)])
            plugin.update(TWO_NODES)
            await node.kubelet.wait_for(lambda: node.kubelet.capacity() == {CY: 4})
        with pytest.raises(TopologyAffinityError):
            await node.kubelet.allocate("c", [("main", CY, 2)])


async def test_pod_resources(node: Node) -> None:
    async with node.plugin(FOUR):
        await node.kubelet.allocate("ns/pod", [("one", CY, 1), ("two", CY, 1)])
        async with grpc.aio.insecure_channel(f"unix:{node.kubelet.directory}/pod-resources/kubelet.sock") as channel:
            stub = PodResourcesListerStub(channel)
            [pod] = (await stub.List(resources_pb.ListPodResourcesRequest(), timeout=60)).pod_resources
            assert (pod.namespace, pod.name, [each.name for each in pod.containers]) == ("ns", "pod", ["one", "two"])
            request = resources_pb.GetPodResourcesRequest(pod_name="pod", pod_namespace="ns")
            assert (await stub.Get(request, timeout=60)).pod_resources == pod
            allocatable = await stub.GetAllocatableResources(resources_pb.AllocatableResourcesRequest(), timeout=60)
            assert len(allocatable.devices) == 4
            with pytest.raises(grpc.aio.AioRpcError, match="pod nobody in namespace ns not found"):
                await stub.Get(resources_pb.GetPodResourcesRequest(pod_name="nobody", pod_namespace="ns"), timeout=60)


async def test_held_devices_are_read_through_the_helper(node: Node) -> None:
    helper = DirectHelper(node.kubelet.directory)
    assert (await held_devices(helper, node.kubelet.plugin_directory)).holders == {}
    async with node.plugin(FOUR):
        await node.kubelet.allocate("pod", [("main", CY, 2)])
        assert (await held_devices(helper, node.kubelet.plugin_directory)).holders == {
            "cy": dict.fromkeys((address(0), address(1)), Holder("default/pod/main", 0))
        }
        node.kubelet.free("pod")
        assert (await held_devices(helper, node.kubelet.plugin_directory)).holders == {}


async def test_held_devices_are_unknown_with_a_reason(node: Node) -> None:
    helper = DirectHelper(node.kubelet.directory)
    directory = node.kubelet.plugin_directory
    sock = node.kubelet.directory / "pod-resources/kubelet.sock"

    helper.error = HelperError(ErrorCode.DENIED, "the policy forbids pod-resources")
    with pytest.raises(PodResourcesError, match="the policy forbids pod-resources"):
        await held_devices(helper, directory)
    helper.error = None

    with pytest.raises(PodResourcesError, match="cannot connect to the kubelet's PodResources"):
        await held_devices(helper, directory / "missing")

    await node.kubelet.stop(kill=True)
    with pytest.raises(PodResourcesError, match="the kubelet is not listening on"):
        await held_devices(helper, directory)

    old = grpc.aio.server()
    await grpc_socket.start(old, sock, 0o600)
    try:
        with pytest.raises(PodResourcesError, match="too old"):
            await held_devices(helper, directory)
    finally:
        await old.stop(None)
