"""Registration by the plugin watcher: what the kubelet does, real and emulated, and that our endpoint lives with it."""

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from kubelet.either import AnyKubelet, EmulatedKubelet
from kubelet.production import production_node
from kubelet.real_kubelet import RealKubelet
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.allocation import AllocationPolicy
from qat_server.kubelet.device import Device
from qat_server.kubelet.device_plugin import DevicePlugin
from qat_server.kubelet.endpoint import Endpoint
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as api
from qat_server.kubelet.generated import pluginregistration_v1_pb2 as pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import (
    RegistrationStub,
    add_DevicePluginServicer_to_server,
)
from qat_server.kubelet.generated.pluginregistration_v1_pb2_grpc import (
    RegistrationServicer,
    add_RegistrationServicer_to_server,
)
from qat_server.kubelet.registration.directories import Registration
from qat_server.kubelet.registration.plugin_watcher import WatcherRegistrar
from qat_server.kubelet.sockets import grpc_socket
from qat_server.kubelet.sockets.socket_files import BoundSocket
from qat_simulation.node.description import Node, Pf
from support.conditions import until
from support.endpoints import NoUsage, device, running_endpoint
from support.kubelet_sockets import short_directory

CY = "qat.intel.com/cy"


@pytest.fixture(params=[RealKubelet, EmulatedKubelet], ids=["real", "emulated"])
async def kubelet(request: pytest.FixtureRequest) -> AsyncIterator[AnyKubelet]:
    with short_directory() as directory:
        made: AnyKubelet = request.param(directory / "kubelet")
        await made.start()
        registry(made).mkdir()
        try:
            yield made
        finally:
            await made.close()


def registry(kubelet: AnyKubelet) -> Path:
    return kubelet.directory / "plugins_registry" / "qat.intel.com"


def devices(number: int) -> list[Device]:
    return [device(each) for each in range(number)]


class Plugin(RegistrationServicer):
    """A plugin that does nothing by itself: what it is asked and told."""

    def __init__(self, number: int = 4, versions: Sequence[str] = ("v1beta1",), kind: str = "DevicePlugin") -> None:
        self.info = pb.PluginInfo(type=kind, name=CY, supported_versions=versions)
        self.asked = 0
        self.told: list[str | None] = []
        self.devices = DevicePlugin("cy", AllocationPolicy.NONE, Counters(), NoUsage())
        self.devices.update(devices(number))

    async def GetInfo(self, request: pb.InfoRequest, context: object) -> pb.PluginInfo:
        self.asked += 1
        return self.info

    async def NotifyRegistrationStatus(
        self, request: pb.RegistrationStatus, context: object
    ) -> pb.RegistrationStatusResponse:
        self.told.append(None if request.plugin_registered else request.error)
        return pb.RegistrationStatusResponse()

    @asynccontextmanager
    async def at(self, path: Path) -> AsyncIterator[BoundSocket]:
        server = grpc.aio.server()
        add_DevicePluginServicer_to_server(self.devices, server)
        add_RegistrationServicer_to_server(self, server)
        bound = await grpc_socket.start(server, path, 0o660)
        try:
            yield bound
        finally:
            await server.stop(None)
            bound.remove()


@asynccontextmanager
async def running(kubelet: AnyKubelet, number: int = 4) -> AsyncIterator[Endpoint]:
    registrar = WatcherRegistrar("cy", registry(kubelet))
    async with running_endpoint("cy", registrar, devices(number)) as endpoint:
        yield endpoint
    assert os.listdir(registry(kubelet)) == []


def made_at(endpoint: Endpoint) -> int | None:
    """When its socket was made, None while there is none."""
    try:
        return endpoint.socket_path.stat().st_ctime_ns
    except FileNotFoundError:
        return None


# What the kubelet does


async def test_a_socket_is_found_wherever_it_appears(kubelet: AnyKubelet) -> None:
    deep = registry(kubelet) / "a" / "b"
    deep.mkdir(parents=True)
    plugin = Plugin()
    async with plugin.at(deep / "no-particular-name"):
        await kubelet.wait_for(capacity={CY: 4}, allocatable={CY: 4})
        await until(lambda: plugin.told)
        assert set(plugin.told) == {None}
    await kubelet.wait_for(capacity={CY: 4}, allocatable={CY: 0})


async def test_dotted_names_are_ignored_but_not_in_a_dotted_directory_that_a_starting_kubelet_finds(
    kubelet: AnyKubelet,
) -> None:
    hidden, inside, both, last = Plugin(), Plugin(), Plugin(), Plugin()
    folder = registry(kubelet) / ".folder"
    async with Plugin().at(registry(kubelet) / "cy.sock"):
        await kubelet.wait_for(allocatable={CY: 4})  # so it has looked through what was there at its start
    folder.mkdir()
    async with (
        hidden.at(registry(kubelet) / ".cy.sock"),
        inside.at(folder / "s"),
        both.at(folder / ".s"),
        last.at(registry(kubelet) / "last.sock"),
    ):
        await until(lambda: last.asked)
        assert (hidden.asked, inside.asked, both.asked) == (0, 0, 0)
        await kubelet.restart()
        await until(lambda: inside.asked)
        assert (hidden.asked, both.asked) == (0, 0)


async def test_it_is_asked_again_when_the_name_appears_again_and_not_when_the_stream_ends(kubelet: AnyKubelet) -> None:
    plugin, path = Plugin(), registry(kubelet) / "cy.sock"
    async with plugin.at(path):
        await kubelet.wait_for(allocatable={CY: 4})
        await until(lambda: plugin.told)
        asked = plugin.asked
        plugin.devices.withdraw()
        await kubelet.wait_for(allocatable={CY: 0})
        for number in range(2):  # it looks twice, and finds others
            other = Plugin(kind="Teapot")
            async with other.at(registry(kubelet) / f"other-{number}.sock"):
                await until(lambda other=other: other.asked)  # type: ignore[misc]
        assert plugin.asked == asked
        assert (await kubelet.allocatable())[CY] == 0
        second = Plugin(3)
        async with second.at(path):  # renamed over the first one
            await kubelet.wait_for(allocatable={CY: 3})


async def test_a_restarted_kubelet_finds_what_is_there(kubelet: AnyKubelet) -> None:
    plugin = Plugin()
    async with plugin.at(registry(kubelet) / "cy.sock"):
        await kubelet.wait_for(allocatable={CY: 4})
        for kill in (False, True):
            asked = plugin.asked
            await kubelet.restart(kill)
            await kubelet.wait_for(allocatable={CY: 4})
            assert plugin.asked == asked + 1


@pytest.mark.parametrize(
    ("kind", "versions", "told"),
    [
        (
            "DevicePlugin",
            ("v9", "v0"),
            "RegisterPlugin error -- plugin validation failed with err: manager version, v1beta1, is not among plugin"
            " supported versions [v9 v0]",
        ),
        (
            "Teapot",
            ("v1beta1",),
            "RegisterPlugin error -- no handler registered for plugin type: Teapot at socket {path}",
        ),
    ],
    ids=["version", "type"],
)
async def test_a_refusal_is_told_again_and_again(
    kubelet: AnyKubelet, kind: str, versions: Sequence[str], told: str
) -> None:
    plugin, path = Plugin(versions=versions, kind=kind), registry(kubelet) / "cy.sock"
    async with plugin.at(path):
        await until(lambda: len(plugin.told) >= 2)
        assert set(plugin.told) == {told.format(path=path)}
        assert await kubelet.capacity() == {}


async def test_the_socket_of_a_dead_plugin_costs_its_path_a_pause_and_no_other(kubelet: AnyKubelet) -> None:
    await kubelet.stop()
    for name in ("cy.sock", "cy-other.sock"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(registry(kubelet) / name))
    await kubelet.start()
    async with Plugin().at(registry(kubelet) / "cy-new.sock"):
        await kubelet.wait_for(allocatable={CY: 4})


# What our endpoint makes of it


async def test_an_endpoint_registers_and_is_deregistered_when_it_is_withdrawn(kubelet: AnyKubelet) -> None:
    async with running(kubelet) as endpoint:
        await kubelet.wait_for(allocatable={CY: 4})
        await until(lambda: endpoint.state.registered)
        endpoint.update(devices(3))
        await kubelet.wait_for(allocatable={CY: 3})
        pod = await kubelet.allocate("a", [("main", CY, 2)])
        assert sorted(pod.containers["main"].envs) == ["QAT0", "QAT1"]
        await endpoint.withdraw()
        await kubelet.wait_for(capacity={CY: 3}, allocatable={CY: 0})


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_an_endpoint_is_back_at_once_after_each_restart(kubelet: AnyKubelet, kill: bool) -> None:
    async with running(kubelet) as endpoint:
        await kubelet.wait_for(allocatable={CY: 4})
        pod = await kubelet.allocate("a", [("main", CY, 2)])
        for _ in range(5):
            before = made_at(endpoint)
            await kubelet.stop(kill)
            await until(lambda before=before: made_at(endpoint) not in (None, before))  # type: ignore[misc]
            await kubelet.start()
            await kubelet.wait_for(allocatable={CY: 4})
        assert await kubelet.devices_of("a") == set(pod.devices)
        await until(lambda: endpoint.state.registered)


async def test_restarts_without_a_break_end_well(kubelet: AnyKubelet) -> None:
    async with running(kubelet) as endpoint:
        await kubelet.wait_for(allocatable={CY: 4})
        for _ in range(20):
            await kubelet.restart()
        await kubelet.wait_for(allocatable={CY: 4})
        await until(lambda: endpoint.state.registered)


async def test_the_end_of_another_plugins_stream_does_not_leave_the_resource_at_0(kubelet: AnyKubelet) -> None:
    """As when the way to register is changed: the old server's stream ends, and the kubelet drops the new client."""
    other = Plugin(3)
    (kubelet.directory / "device-plugins" / "old").mkdir()
    async with other.at(kubelet.directory / "device-plugins" / "old" / "cy.sock"):
        async with grpc.aio.insecure_channel(f"unix:{kubelet.directory}/device-plugins/kubelet.sock") as channel:
            request = api.RegisterRequest(version="v1beta1", endpoint="old/cy.sock", resource_name=CY)
            await RegistrationStub(channel).Register(request, timeout=10)
        await kubelet.wait_for(allocatable={CY: 3})
        async with running(kubelet) as endpoint:
            await kubelet.wait_for(allocatable={CY: 4})
            await until(lambda: endpoint.state.registered)
            other.devices.withdraw()
            await until(lambda: not endpoint.state.registered)
            await kubelet.wait_for(allocatable={CY: 4})
            await until(lambda: endpoint.state.registered)


async def test_a_socket_that_was_deleted_is_made_anew(kubelet: AnyKubelet) -> None:
    async with running(kubelet) as endpoint:
        await kubelet.wait_for(allocatable={CY: 4})
        endpoint.socket_path.unlink()
        await until(lambda: not endpoint.state.registered)
        await kubelet.wait_for(allocatable={CY: 4})


# As in production


async def test_as_in_production_without_ever_touching_the_kubelets_socket(
    as_in_production: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The helper's policy allows plugins_registry alone, and no connection to the kubelet at all."""
    policy = tmp_path / "policy.toml"
    policy.write_text('operations = ["BindDriver", "PrepareSocketDirectory"]\ndirectories = ["plugins-registry"]\n')
    policy.chmod(0o644)
    monkeypatch.setenv("QAT_HELPER_POLICY", str(policy))
    node = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, numa_node=0),))
    watched = Registration.PLUGIN_WATCHER
    async with production_node(node, ("--health-interval=0",), registration=watched) as running_one:
        await running_one.start({CY: 4})
        await running_one.kubelet.allocate("a", [("main", CY, 2)])
        before = sorted(os.listdir(running_one.sockets))
        await running_one.kubelet.restart(kill=True)
        await running_one.wait({CY: 4})
        await running_one.stop_server()
        await running_one.kubelet.wait_for(capacity={CY: 4}, allocatable={CY: 0})
        await running_one.start_again({CY: 4})
        assert sorted(os.listdir(running_one.sockets)) != before, "a name of its own for each life"
        assert not (running_one.kubelet.directory / "device-plugins" / "qat.intel.com").exists()
        said = running_one.audit_log.read_text()
        assert '"directory":"plugins-registry"' in said
        assert '"event":"asked","operation":"RegisterResource"' not in said
        assert '"event":"asked","operation":"OpenPodResources"' not in said
