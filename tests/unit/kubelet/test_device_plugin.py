"""The DevicePlugin service over real gRPC: tables of answers and refusals, and ListAndWatch streams."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc.aio
import pytest

from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.allocation import AllocationPolicy
from qat_server.kubelet.device import Device
from qat_server.kubelet.device_plugin import DevicePlugin
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import (
    DevicePluginStub,
    add_DevicePluginServicer_to_server,
)
from qat_server.kubelet.sockets import grpc_socket
from qat_shared.pci import PciAddress
from support.conditions import until
from support.endpoints import NoUsage
from support.kubelet_sockets import short_directory

if TYPE_CHECKING:
    from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import DevicePluginAsyncStub

VFIO = "/dev/vfio/vfio"
PF = PciAddress.parse("0000:6b:00.0")
OTHER_PF = PciAddress.parse("0000:70:00.0")


def vfio(address: str, group: str, reason: str = "", numa_node: int | None = 0) -> Device:
    pf = OTHER_PF if ":70:" in address else PF
    return Device(PciAddress.parse(address), pf, numa_node, (f"/dev/vfio/{group}", VFIO), (), reason)


def uio(address: str, number: int) -> Device:
    mounts = (f"/sys/class/uio/uio{number}/device",)
    return Device(PciAddress.parse(address), PF, None, (f"/dev/uio{number}",), mounts)


DEVICES = (
    vfio("0000:6b:00.1", "31"),
    vfio("0000:6b:00.2", "32"),
    vfio("0000:6b:00.3", "32", numa_node=1),  # shares its group with .2
    vfio("0000:6b:00.4", "noiommu-3", numa_node=None),
    vfio("0000:6b:00.5", "35", reason="its PF's heartbeat failed"),
    vfio("0000:70:00.1", "41"),
    uio("10000:01:00.1", 7),
)


class Served:
    """A plugin, its stub, and short forms of the RPCs."""

    def __init__(self, plugin: DevicePlugin, stub: "DevicePluginAsyncStub", counters: Counters) -> None:
        self.plugin = plugin
        self.stub = stub
        self.counters = counters

    async def allocate(self, *containers: list[str]) -> pb.AllocateResponse:
        requests = [pb.ContainerAllocateRequest(devices_ids=ids) for ids in containers]
        return await self.stub.Allocate(pb.AllocateRequest(container_requests=requests), timeout=60)

    async def prefer(self, available: list[str], must: list[str], size: int) -> list[str]:
        request = pb.PreferredAllocationRequest()
        request.container_requests.add(available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=size)
        answer = await self.stub.GetPreferredAllocation(request, timeout=60)
        return list(answer.container_responses[0].deviceIDs)


@pytest.fixture
def policy() -> AllocationPolicy:
    return AllocationPolicy.NONE


@pytest.fixture
async def served(policy: AllocationPolicy) -> AsyncIterator[Served]:
    counters = Counters()
    plugin = DevicePlugin("cy", policy, counters, NoUsage(), clock=lambda: 42.0)
    plugin.update(DEVICES)
    server = grpc.aio.server()
    add_DevicePluginServicer_to_server(plugin, server)
    with short_directory() as directory:
        await grpc_socket.start(server, directory / "cy.sock", 0o660)
        async with grpc.aio.insecure_channel(f"unix:{directory}/cy.sock") as channel:
            yield Served(plugin, DevicePluginStub(channel), counters)
            plugin.withdraw()
        await server.stop(None)


ANSWERS = [
    ("vfio", ["0000:6b:00.1"], ["/dev/vfio/31", VFIO], [], {"QAT0": "0000:6b:00.1"}),
    (
        "several, in address order",
        ["0000:70:00.1", "0000:6b:00.4", "0000:6b:00.1"],
        ["/dev/vfio/31", VFIO, "/dev/vfio/noiommu-3", "/dev/vfio/41"],
        [],
        {"QAT0": "0000:6b:00.1", "QAT1": "0000:6b:00.4", "QAT2": "0000:70:00.1"},
    ),
    (
        "one group, listed once",
        ["0000:6b:00.2", "0000:6b:00.3"],
        ["/dev/vfio/32", VFIO],
        [],
        {"QAT0": "0000:6b:00.2", "QAT1": "0000:6b:00.3"},
    ),
    ("igb_uio", ["10000:01:00.1"], ["/dev/uio7"], ["/sys/class/uio/uio7/device"], {"QAT0": "10000:01:00.1"}),
]


@pytest.mark.parametrize(("name", "ids", "nodes", "mounts", "envs"), ANSWERS, ids=[case[0] for case in ANSWERS])
async def test_allocate_answers(
    served: Served, name: str, ids: list[str], nodes: list[str], mounts: list[str], envs: dict[str, str]
) -> None:
    [answer] = (await served.allocate(ids)).container_responses
    assert [(each.host_path, each.container_path, each.permissions) for each in answer.devices] == [
        (node, node, "rw") for node in nodes
    ]
    assert [(each.host_path, each.container_path) for each in answer.mounts] == [(path, path) for path in mounts]
    assert dict(answer.envs) == envs
    assert served.plugin.allocated_at == {PciAddress.parse(each): 42.0 for each in ids}


async def test_each_container_is_numbered_separately(served: Served) -> None:
    first, second = (await served.allocate(["0000:6b:00.1"], ["0000:6b:00.2"])).container_responses
    assert dict(first.envs) == {"QAT0": "0000:6b:00.1"}
    assert dict(second.envs) == {"QAT0": "0000:6b:00.2"}
    assert served.counters.allocated_devices["cy"] == 2


INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
REFUSALS = [
    ("no container", [], INVALID, "names no container"),
    ("no device", [[]], INVALID, "names no device"),
    ("no device for the second container", [["0000:6b:00.1"], []], INVALID, "names no device"),
    ("twice", [["0000:6b:00.1", "0000:6b:00.1"]], INVALID, "twice"),
    ("unknown", [["0000:6b:01.0"]], INVALID, "'0000:6b:01.0' is not a device of qat.intel.com/cy"),
    ("no address", [["x" * 5000]], INVALID, "is not a device of qat.intel.com/cy"),
    ("other spelling", [["6b:00.1"]], INVALID, "'6b:00.1' is not a device of"),
    ("unhealthy", [["0000:6b:00.5"]], PRECONDITION, "0000:6b:00.5 cannot be allocated: its PF's heartbeat"),
]


@pytest.mark.parametrize(("name", "containers", "code", "words"), REFUSALS, ids=[case[0] for case in REFUSALS])
async def test_allocate_refuses(
    served: Served, name: str, containers: list[list[str]], code: grpc.StatusCode, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.allocate(*containers)
    assert caught.value.code() is code
    assert words in (caught.value.details() or "")
    assert len(caught.value.details() or "") < 300
    assert served.plugin.allocated_at == {}
    assert sum(served.counters.allocations.values()) == 1


async def test_a_device_that_left_the_list_is_distinguished_from_an_unknown_one(served: Served) -> None:
    served.plugin.update(DEVICES[1:])
    with pytest.raises(grpc.aio.AioRpcError, match=r"QAT device 0000:6b:00\.1 is no longer listed") as caught:
        await served.allocate(["0000:6b:00.1"])
    assert caught.value.code() is PRECONDITION


async def test_a_withdrawn_resource_allocates_nothing(served: Served) -> None:
    served.plugin.withdraw()
    with pytest.raises(grpc.aio.AioRpcError, match="is being withdrawn") as caught:
        await served.allocate(["0000:6b:00.1"])
    assert caught.value.code() is PRECONDITION


PREFERENCES = [
    (
        "first in order",
        AllocationPolicy.NONE,
        ["0000:70:00.1", "0000:6b:00.2", "0000:6b:00.1"],
        [],
        1,
        ["0000:6b:00.1"],
    ),
    ("must include", AllocationPolicy.NONE, ["0000:6b:00.1", "0000:70:00.1"], ["0000:70:00.1"], 1, ["0000:70:00.1"]),
    (
        "balanced counts unavailable devices",
        AllocationPolicy.BALANCED,
        ["0000:6b:00.1", "0000:70:00.1", "0000:6b:00.2"],
        [],
        1,
        ["0000:70:00.1"],
    ),
    (
        "unhealthy and unknown devices are skipped",
        AllocationPolicy.NONE,
        ["0000:6b:00.5", "0000:00:00.0", "0000:6b:00.4"],
        [],
        1,
        ["0000:6b:00.4"],
    ),
    (
        "an unhealthy must-include device is included",
        AllocationPolicy.NONE,
        ["0000:6b:00.1", "0000:6b:00.5"],
        ["0000:6b:00.5"],
        2,
        ["0000:6b:00.1", "0000:6b:00.5"],
    ),
]


@pytest.mark.parametrize(
    ("name", "policy", "available", "must", "size", "chosen"), PREFERENCES, ids=[case[0] for case in PREFERENCES]
)
async def test_preferred_allocation(
    served: Served, name: str, available: list[str], must: list[str], size: int, chosen: list[str]
) -> None:
    assert await served.prefer(available, must, size) == chosen
    assert served.counters.preferred_allocations["cy", "ok"] == 1


@pytest.mark.parametrize(
    ("available", "must", "size", "words"),
    [
        (["0000:6b:00.1"], [], 2, "only 1"),
        (["0000:6b:00.1", "0000:6b:00.5"], [], 2, "1 of the offered devices are unhealthy or no longer listed"),
        (["0000:6b:00.1"], ["nothing"], 1, "'nothing' is not a device of qat.intel.com/cy"),
        (["0000:6b:00.1"], [], 0, "0 devices"),
        (["0000:6b:00.1"], [], -1, "-1 devices"),
    ],
    ids=["too many", "too many are healthy", "unknown must", "none", "negative"],
)
async def test_preferred_allocation_refuses(
    served: Served, available: list[str], must: list[str], size: int, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.prefer(available, must, size)
    assert caught.value.code() is INVALID
    assert words in (caught.value.details() or "")


async def test_options_and_pre_start(served: Served) -> None:
    options = await served.stub.GetDevicePluginOptions(pb.Empty(), timeout=60)
    assert options == pb.DevicePluginOptions(pre_start_required=False, get_preferred_allocation_available=True)
    assert await served.stub.PreStartContainer(pb.PreStartContainerRequest(), timeout=60) is not None


async def test_the_list_has_health_and_numa_node(served: Served) -> None:
    stream = served.stub.ListAndWatch(pb.Empty(), timeout=60)
    listed = await stream.read()
    assert isinstance(listed, pb.ListAndWatchResponse)
    assert [(each.ID, each.health, [node.ID for node in each.topology.nodes]) for each in listed.devices][2:5] == [
        ("0000:6b:00.3", "Healthy", [1]),
        ("0000:6b:00.4", "Healthy", []),
        ("0000:6b:00.5", "Unhealthy", [0]),
    ]
    assert not listed.devices[3].HasField("topology")
    stream.cancel()


async def test_every_stream_gets_each_change_and_its_end(served: Served) -> None:
    streams = [served.stub.ListAndWatch(pb.Empty(), timeout=60) for _ in range(3)]
    for stream in streams:
        assert len((await read(stream)).devices) == len(DEVICES)
    served.plugin.update(DEVICES)  # nothing new: nothing is sent
    served.plugin.update((*DEVICES[:4], vfio("0000:6b:00.5", "35", reason="another reason"), *DEVICES[5:]))
    served.plugin.update(DEVICES[:2])
    for stream in streams:
        assert len((await read(stream)).devices) == 2
    served.plugin.withdraw()
    for stream in streams:
        assert await stream.read() is grpc.aio.EOF
    await until(lambda: served.plugin.streams.ended == 3)


async def test_a_slow_reader_gets_the_newest_list(served: Served) -> None:
    stream = served.stub.ListAndWatch(pb.Empty(), timeout=60)
    await until(lambda: served.plugin.streams.opened)
    for _ in range(50):
        served.plugin.update(DEVICES[:1])
        served.plugin.update(DEVICES[:2])
    served.plugin.update(DEVICES[:3])
    reads = 0
    while len((await read(stream)).devices) != 3:
        reads += 1
    assert reads <= 2
    stream.cancel()


async def test_the_end_of_a_stream_is_noticed(served: Served) -> None:
    stream = served.stub.ListAndWatch(pb.Empty(), timeout=60)
    await read(stream)
    changed = asyncio.create_task(served.plugin.streams.wait_for_change())
    stream.cancel()
    await asyncio.wait_for(changed, 120)
    assert (served.plugin.streams.opened, served.plugin.streams.ended) == (1, 1)
    assert not served.plugin.streams.fresh


async def test_a_stream_is_fresh_if_opened_after_the_last_end(served: Served) -> None:
    streams = served.plugin.streams
    older = served.stub.ListAndWatch(pb.Empty(), timeout=60)
    newer = served.stub.ListAndWatch(pb.Empty(), timeout=60)
    await read(older)
    await read(newer)
    both_open = streams.fresh
    older.cancel()
    await until(lambda: streams.ended == 1)
    one_ended = streams.fresh
    newest = served.stub.ListAndWatch(pb.Empty(), timeout=60)
    await read(newest)
    assert (both_open, one_ended, streams.fresh) == (True, False, True), "not fresh even though another stream is open"
    newer.cancel()
    newest.cancel()


async def read(stream: "grpc.aio.UnaryStreamCall[pb.Empty, pb.ListAndWatchResponse]") -> pb.ListAndWatchResponse:
    answer = await stream.read()
    assert isinstance(answer, pb.ListAndWatchResponse)
    return answer
