"""A hostile server: a client of the helper, and a device plugin that answers as it likes. For use against a kubelet.

Its requests are maps, so that they may be of any protocol version, also of the first one, whose OpenKubeletSocket
passed connections to the registration service.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import msgspec

from kubelet.real_kubelet import RealKubelet
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import (
    DevicePluginServicer,
    RegistrationStub,
    add_DevicePluginServicer_to_server,
)
from qat_server.kubelet.sockets import grpc_socket, kubelet_channel
from qat_shared.messages import MAX_MESSAGE
from support.helper_process import Client, Helper, helper

Answer = dict[str, Any]
TIMEOUT: Final = 60.0


class HostilePlugin(DevicePluginServicer):
    """Lists what `lists` yields, for each stream anew, and gives each pod the host. `streams`: how many are open."""

    def __init__(self, devices: Sequence[str] = ("0000:6b:00.1",)) -> None:
        self.devices = tuple(devices)
        self.streams = 0
        self.changed = asyncio.Event()
        self.before_allocate: Callable[[], Awaitable[None]] | None = None

    def list(self, devices: Sequence[str]) -> None:
        """Send another list on all streams."""
        self.devices = tuple(devices)
        self.changed.set()

    async def GetDevicePluginOptions(self, request: pb.Empty, context: object) -> pb.DevicePluginOptions:
        return pb.DevicePluginOptions()

    async def ListAndWatch(self, request: pb.Empty, context: object) -> AsyncIterator[pb.ListAndWatchResponse]:
        self.streams += 1
        try:
            while True:
                self.changed.clear()
                devices = [pb.Device(ID=each, health="Healthy") for each in self.devices]
                yield pb.ListAndWatchResponse(devices=devices)
                await self.changed.wait()
        finally:
            self.streams -= 1

    async def Allocate(self, request: pb.AllocateRequest, context: object) -> pb.AllocateResponse:
        if self.before_allocate is not None:
            await self.before_allocate()
        given = pb.ContainerAllocateResponse(
            mounts=[pb.Mount(host_path="/", container_path="/host")],
            devices=[pb.DeviceSpec(host_path="/dev/sda", container_path="/dev/sda", permissions="rw")],
            envs={"LD_PRELOAD": "/host/tmp/x.so"},
        )
        return pb.AllocateResponse(container_responses=[given for _ in request.container_requests])

    async def GetPreferredAllocation(
        self, request: pb.PreferredAllocationRequest, context: object
    ) -> pb.PreferredAllocationResponse:
        return pb.PreferredAllocationResponse()

    async def PreStartContainer(
        self, request: pb.PreStartContainerRequest, context: object
    ) -> pb.PreStartContainerResponse:
        return pb.PreStartContainerResponse()

    @asynccontextmanager
    async def at(self, path: Path) -> AsyncIterator[Path]:
        """Serve it at a path."""
        server = grpc.aio.server()
        add_DevicePluginServicer_to_server(self, server)
        await grpc_socket.start(server, path, 0o660)
        try:
            yield path
        finally:
            await server.stop(None)


class Attack:
    """A helper and a real kubelet; `sockets` is the server's directory in the kubelet's."""

    def __init__(self, running: Helper, kubelet: RealKubelet) -> None:
        self.running = running
        self.kubelet = kubelet
        self.sockets = kubelet.plugin_directory / "qat.intel.com"

    def connect(self) -> Client:
        return self.running.connect()

    def connections(self) -> int:
        """Sockets that the kubelet has open."""
        number = 0
        for name in os.listdir(f"/proc/{self.kubelet.pid}/fd"):
            with suppress(FileNotFoundError):
                number += os.readlink(f"/proc/{self.kubelet.pid}/fd/{name}").startswith("socket:")
        return number

    def watches(self) -> int:
        """Inotify watches of the kubelet."""
        number = 0
        for name in os.listdir(f"/proc/{self.kubelet.pid}/fdinfo"):
            with suppress(FileNotFoundError):
                text = Path(f"/proc/{self.kubelet.pid}/fdinfo/{name}").read_text()
                number += sum(line.startswith("inotify wd:") for line in text.splitlines())
        return number

    async def register(self, client: Client, resource: str, endpoint: str) -> str:
        """Try to register by each way there is or was. Returns why it failed, "" if it did not."""
        answer, passed = await asyncio.to_thread(
            ask, client, {"op": "RegisterResource", "resource": resource, "endpoint": endpoint}
        )
        if answer["reply"] == "Registered":
            return "" if answer["accepted"] else "the kubelet refuses"
        reason = str(answer["rule"] or answer["code"])
        for old in ({"service": "registration"}, {"service": "pod-resources"}, {}):
            for op in ("OpenKubeletSocket", "OpenPodResources"):
                _, passed = await asyncio.to_thread(ask, client, {"op": op, **old})
                for sock in passed:
                    with suppress(grpc.aio.AioRpcError):
                        async with kubelet_channel.open_channel(sock, self.sockets) as channel:
                            request = pb.RegisterRequest(
                                version="v1beta1", endpoint=f"qat.intel.com/{endpoint}", resource_name=resource
                            )
                            await RegistrationStub(channel).Register(request, timeout=TIMEOUT)
                            return ""
        return reason


@asynccontextmanager
async def attack(*options: str, policy: str = "") -> AsyncIterator[Attack]:
    """A node under attack by its server; the helper has these options, and this policy file."""
    with helper(start=False) as running:
        if policy:
            path = running.directory / "policy.toml"
            path.write_text(policy)
            path.chmod(0o644)
            options = (*options, f"--policy={path}")
        async with RealKubelet(running.directory / "kubelet") as kubelet:
            running.start(*options)
            attacked = Attack(running, kubelet)
            attacked.sockets.mkdir(exist_ok=True)
            yield attacked


def ask(client: Client, request: Answer) -> tuple[Answer, list[socket.socket]]:
    """The answer, and the sockets that came with it."""
    client.send(msgspec.msgpack.encode({"id": 1, **request}))
    packet, descriptors, _, _ = socket.recv_fds(client.sock, MAX_MESSAGE, 4)
    return msgspec.msgpack.decode(packet), [socket.socket(fileno=each) for each in descriptors]


def requests() -> Iterator[Answer]:
    """Each way in which the protocol has, or had, connections to the kubelet passed."""
    while True:
        yield {"op": "OpenPodResources"}
        yield {"op": "OpenKubeletSocket", "service": "pod-resources"}
        yield {"op": "OpenKubeletSocket", "service": "registration"}
