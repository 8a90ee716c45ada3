"""The harness itself: each command does to the real kubelet what it says, shown with a small device plugin."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest

from kubelet.answers import AdmissionError, KubeletDiedError, KubeletError, KubeletPanicError, TopologyAffinityError
from kubelet.real_kubelet import Damage, RealKubelet
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as api
from qat_server.kubelet.generated import pluginregistration_v1_pb2 as watcher
from qat_server.kubelet.generated import podresources_v1_pb2 as pod_resources
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import (
    DevicePluginServicer,
    RegistrationStub,
    add_DevicePluginServicer_to_server,
)
from qat_server.kubelet.generated.pluginregistration_v1_pb2_grpc import (
    RegistrationServicer,
    add_RegistrationServicer_to_server,
)
from qat_server.kubelet.generated.podresources_v1_pb2_grpc import PodResourcesListerStub
from qat_simulation.kubelet.topology import TopologyPolicy

CY = "qat.intel.com/cy"


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qat-", dir="/tmp") as path:  # a socket's path has 107 bytes
        yield Path(path) / "kubelet"


@pytest.fixture
async def kubelet(directory: Path) -> AsyncIterator[RealKubelet]:
    async with RealKubelet(directory) as kubelet:
        yield kubelet
        assert kubelet.alive, kubelet.log_tail()


@dataclass
class Plugin(DevicePluginServicer):
    """Lists `devices` (id to health and NUMA node), and again when `changed` is set."""

    devices: dict[str, tuple[str, int]]
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def GetDevicePluginOptions(self, request: api.Empty, context: object) -> api.DevicePluginOptions:
        return api.DevicePluginOptions()

    async def ListAndWatch(self, request: api.Empty, context: object) -> AsyncIterator[api.ListAndWatchResponse]:
        while True:
            self.changed.clear()
            yield api.ListAndWatchResponse(
                devices=[
                    api.Device(ID=id_, health=health, topology=api.TopologyInfo(nodes=[api.NUMANode(ID=node)]))
                    for id_, (health, node) in self.devices.items()
                ]
            )
            await self.changed.wait()

    async def Allocate(self, request: api.AllocateRequest, context: object) -> api.AllocateResponse:
        answers = []
        for asked in request.container_requests:
            answer = api.ContainerAllocateResponse(envs={f"QAT{n}": id_ for n, id_ in enumerate(asked.devices_ids)})
            for id_ in asked.devices_ids:
                answer.devices.add(container_path=f"/dev/vfio/{id_}", host_path=f"/dev/vfio/{id_}", permissions="rw")
            answer.mounts.add(container_path="/etc/qat", host_path="/etc/qat", read_only=True)
            answers.append(answer)
        return api.AllocateResponse(container_responses=answers)

    async def GetPreferredAllocation(
        self, request: api.PreferredAllocationRequest, context: object
    ) -> api.PreferredAllocationResponse:
        raise NotImplementedError  # GetDevicePluginOptions did not offer it

    async def PreStartContainer(
        self, request: api.PreStartContainerRequest, context: object
    ) -> api.PreStartContainerResponse:
        raise NotImplementedError  # nor this

    def list_again(self, devices: dict[str, tuple[str, int]]) -> None:
        self.devices = devices
        self.changed.set()

    @asynccontextmanager
    async def registered(self, kubelet: RealKubelet, resource: str = CY) -> AsyncIterator[None]:
        """Serve in a subdirectory, which the kubelet's clean-up leaves alone, and register once."""
        socket = Path("qat") / f"{resource.rpartition('/')[2]}.sock"
        (kubelet.plugin_directory / "qat").mkdir(exist_ok=True)
        server = grpc.aio.server()
        add_DevicePluginServicer_to_server(self, server)
        server.add_insecure_port(f"unix:{kubelet.plugin_directory / socket}")
        await server.start()
        try:
            await self.register(kubelet, resource, socket)
            yield
        finally:
            await server.stop(None)

    async def register(self, kubelet: RealKubelet, resource: str = CY, socket: Path = Path("qat/cy.sock")) -> None:
        async with grpc.aio.insecure_channel(f"unix:{kubelet.registration_socket}") as channel:
            request = api.RegisterRequest(version="v1beta1", endpoint=str(socket), resource_name=resource)
            await RegistrationStub(channel).Register(request, timeout=10)


def four() -> dict[str, tuple[str, int]]:
    return {f"vf{n}": ("Healthy", n // 2) for n in range(4)}


async def test_capacity_follows_the_list(kubelet: RealKubelet) -> None:
    plugin = Plugin(four())
    async with plugin.registered(kubelet):
        await kubelet.wait_for(capacity={CY: 4}, allocatable={CY: 4, "qat.intel.com/dc": None})
        plugin.list_again({**four(), "vf3": ("Unhealthy", 1)})
        await kubelet.wait_for(capacity={CY: 4}, allocatable={CY: 3})
        vf3 = (await kubelet.devices())[CY][3]
        assert (vf3.id, vf3.health, vf3.numa_nodes, vf3.allocatable, vf3.holder) == (
            "vf3",
            "Unhealthy",
            (1,),
            False,
            None,
        )
        assert (await kubelet.check()).violations == ()
        assert await kubelet.healthy()
        with pytest.raises(TimeoutError, match="wanted capacity"):
            await kubelet.wait_for(capacity={CY: 5}, seconds=0.01)
    await kubelet.wait_for(capacity={CY: 4}, allocatable={CY: 0})
    await kubelet.age(CY)
    await kubelet.wait_for(capacity={CY: None})


async def test_containers_are_given_what_the_plugin_answered(kubelet: RealKubelet) -> None:
    dc = "qat.intel.com/dc"
    compression = Plugin({"dc0": ("Healthy", 0)})
    async with Plugin(four()).registered(kubelet), compression.registered(kubelet, dc):
        await kubelet.wait_for(allocatable={CY: 4, dc: 1})
        allocation = await kubelet.allocate("a", [("one", CY, 2), ("two", CY, 1), ("two", dc, 1)])
        one, two = allocation.containers["one"], allocation.containers["two"]
        assert len(one.by_resource[CY]) == 2
        assert set(one.envs) == {"QAT0", "QAT1"}
        assert set(one.device_nodes) == {f"/dev/vfio/{id_}" for id_ in one.devices}
        assert [(mount.host_path, mount.read_only) for mount in one.mounted] == [("/etc/qat", True)]
        assert two.by_resource[dc] == ("dc0",)
        assert len(two.by_resource[CY]) == 1
        assert set(allocation.devices) == await kubelet.devices_of("a")
        assert await kubelet.allocatable_free() == {CY: 1, dc: 0}
        assert await kubelet.restart_container("a", "one") == one
        anew = await kubelet.allocate("a", [("one", CY, 2), ("two", CY, 1), ("two", dc, 1)])
        assert anew.containers["one"] == one
        assert anew.devices == allocation.devices  # of both QAT0 of "two", the kubelet takes whichever a map has first
        assert (await kubelet.check()).violations == ()

        with pytest.raises(AdmissionError, match="Requested: 2, Available: 1") as refused:
            await kubelet.allocate("b", [("main", CY, 2)])
        assert refused.value.reason == "UnexpectedAdmissionError"
        assert [pod.pod for pod in await kubelet.pods()] == ["a"]
        await kubelet.free("a")
        assert await kubelet.allocatable_free() == {CY: 4, dc: 1}


async def test_requests_that_make_no_sense_are_refused(kubelet: RealKubelet) -> None:
    async with Plugin(four()).registered(kubelet):
        await kubelet.wait_for(allocatable={CY: 4})
        await kubelet.allocate("a", [("main", CY, 1)])
        for asked, kind in (
            (kubelet.allocate("a", [("main", CY, 2)]), "request"),
            (kubelet.allocate("b", []), "request"),
            (kubelet.free("b"), "not-found"),
            (kubelet.age(CY), "request"),
            (kubelet.start(), "running"),
        ):
            with pytest.raises(KubeletError) as refused:
                await asked
            assert refused.value.kind == kind
        await kubelet.stop()
        with pytest.raises(KubeletError) as refused:
            await kubelet.capacity()
        assert refused.value.kind == "stopped"


@pytest.mark.parametrize("policy", [TopologyPolicy.RESTRICTED, TopologyPolicy.SINGLE_NUMA_NODE])
async def test_the_topology_manager_decides(directory: Path, policy: TopologyPolicy) -> None:
    async with RealKubelet(directory, policy=policy) as kubelet, Plugin(four()).registered(kubelet):
        await kubelet.wait_for(allocatable={CY: 4})
        first = await kubelet.allocate("a", [("main", CY, 1)])
        second = await kubelet.allocate("b", [("main", CY, 2)])
        assert {node for _, node in (four()[id_] for id_ in second.devices)} != {four()[first.devices[0]][1]}
        assert len({four()[id_][1] for id_ in second.devices}) == 1
        if policy is TopologyPolicy.SINGLE_NUMA_NODE:
            await kubelet.free("b")
            with pytest.raises(TopologyAffinityError):
                await kubelet.allocate("c", [("main", CY, 3)])


@pytest.mark.parametrize("kill", [False, True])
async def test_pods_keep_their_devices_over_a_restart(kubelet: RealKubelet, kill: bool) -> None:
    plugin = Plugin(four())
    async with plugin.registered(kubelet):
        await kubelet.wait_for(allocatable={CY: 4})
        devices = set((await kubelet.allocate("a", [("main", CY, 3)])).devices)
        await kubelet.stop(kill)
        assert kubelet.registration_socket.exists() == kill
        assert await kubelet.start() == ()
        await kubelet.wait_for(allocatable={CY: 0})
        await plugin.register(kubelet)
        await kubelet.wait_for(allocatable={CY: 4})
        assert await kubelet.devices_of("a") == devices
        assert (await kubelet.check()).violations == ()


@pytest.mark.parametrize("damage", ["garbage", "checksum", "empty", "removed"])
async def test_a_damaged_checkpoint_forgets_the_pods_devices(kubelet: RealKubelet, damage: Damage) -> None:
    plugin = Plugin(four())
    async with plugin.registered(kubelet):
        await kubelet.wait_for(allocatable={CY: 4})
        await kubelet.allocate("a", [("main", CY, 3)])
        await kubelet.stop(kill=True)
        kubelet.damage_checkpoint(damage)
        assert await kubelet.start() == ()
        assert await kubelet.allocatable() == {}
        await plugin.register(kubelet)
        await kubelet.wait_for(allocatable={CY: 4})
        assert await kubelet.devices_of("a") == set()


async def test_after_a_reboot_pods_from_before_are_refused(kubelet: RealKubelet) -> None:
    async with Plugin(four()).registered(kubelet):
        await kubelet.wait_for(allocatable={CY: 4})
        await kubelet.allocate("a", [("main", CY, 1)])
        (refused,) = await kubelet.restart(reboot=True)
        assert (refused.pod, refused.reason) == ("a", "UnexpectedAdmissionError")
        assert await kubelet.pods() == ()


async def test_pod_resources_tells_who_holds_what(kubelet: RealKubelet) -> None:
    async with (
        Plugin(four()).registered(kubelet),
        grpc.aio.insecure_channel(f"unix:{kubelet.pod_resources_socket}") as channel,
    ):
        await kubelet.wait_for(allocatable={CY: 4})
        allocation = await kubelet.allocate("a", [("main", CY, 2)])
        lister = PodResourcesListerStub(channel)
        (pod,) = (await lister.List(pod_resources.ListPodResourcesRequest())).pod_resources
        assert (pod.namespace, pod.name, [container.name for container in pod.containers]) == ("default", "a", ["main"])
        assert sorted(id_ for device in pod.containers[0].devices for id_ in device.device_ids) == list(
            allocation.devices
        )
        known = (await lister.GetAllocatableResources(pod_resources.AllocatableResourcesRequest())).devices
        assert sorted(id_ for device in known for id_ in device.device_ids) == sorted(four())


@dataclass
class WatchedPlugin(Plugin, RegistrationServicer):
    """Waits in plugins_registry to be asked for its endpoint: the registration socket itself, since none is named."""

    verdict: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def GetInfo(self, request: watcher.InfoRequest, context: object) -> watcher.PluginInfo:
        return watcher.PluginInfo(type="DevicePlugin", name=CY, supported_versions=["v1beta1"])

    async def NotifyRegistrationStatus(
        self, request: watcher.RegistrationStatus, context: object
    ) -> watcher.RegistrationStatusResponse:
        self.verdict.set_result(request.plugin_registered)
        return watcher.RegistrationStatusResponse()


async def test_the_plugin_watcher_finds_a_socket(kubelet: RealKubelet) -> None:
    plugin = WatchedPlugin(four())
    server = grpc.aio.server()
    add_DevicePluginServicer_to_server(plugin, server)
    add_RegistrationServicer_to_server(plugin, server)
    (kubelet.registry_directory / "qat.intel.com").mkdir()
    server.add_insecure_port(f"unix:{kubelet.registry_directory / 'qat.intel.com' / 'cy.sock'}")
    await server.start()
    try:
        await kubelet.wait_for(allocatable={CY: 4})
        assert await plugin.verdict
    finally:
        await server.stop(None)


async def test_health_of_a_pods_device(kubelet: RealKubelet) -> None:
    plugin = Plugin(four())
    async with plugin.registered(kubelet):
        await kubelet.wait_for(allocatable={CY: 4})
        (id_,) = (await kubelet.allocate("a", [("main", CY, 1)])).devices
        assert await kubelet.status("a") == {"main": {CY: {id_: "Healthy"}}}
        plugin.list_again({**four(), id_: ("Unhealthy", four()[id_][1])})
        await kubelet.wait_for(allocatable={CY: 3})
        assert await kubelet.status("a") == {"main": {CY: {id_: "Unhealthy"}}}


class EmptyAnswer(Plugin):
    async def Allocate(self, request: api.AllocateRequest, context: object) -> api.AllocateResponse:
        return api.AllocateResponse()


async def test_check_finds_leaked_devices(kubelet: RealKubelet) -> None:
    async with EmptyAnswer(four()).registered(kubelet):
        await kubelet.wait_for(allocatable={CY: 4})
        with pytest.raises(AdmissionError, match="no containers return"):
            await kubelet.allocate("a", [("main", CY, 1)])
        (violation,) = (await kubelet.check()).violations
        assert "it has leaked" in violation


class VanishesInAllocate(Plugin):
    """Its devices are gone from the list before Allocate answers: what must never be done to a kubelet."""

    gone: asyncio.Event

    async def Allocate(self, request: api.AllocateRequest, context: object) -> api.AllocateResponse:
        self.list_again({})
        await self.gone.wait()
        return await super().Allocate(request, context)


async def test_a_crash_of_the_kubelet_is_seen_with_its_trace(directory: Path) -> None:
    plugin = VanishesInAllocate(four())
    plugin.gone = asyncio.Event()
    async with RealKubelet(directory) as kubelet, plugin.registered(kubelet):
        await kubelet.wait_for(allocatable={CY: 4})
        allocating = asyncio.create_task(kubelet.allocate("a", [("main", CY, 1)]))
        await kubelet.wait_for(capacity={CY: 0})
        plugin.gone.set()
        with pytest.raises(KubeletPanicError, match="nil pointer dereference") as died:
            await allocating
        assert died.value.status == 2
        assert not kubelet.alive
        with pytest.raises(KubeletDiedError):
            await kubelet.capacity()
        (refused,) = await kubelet.start()  # its containers never ran, and the plugin has not registered yet
        assert refused.pod == "a"
