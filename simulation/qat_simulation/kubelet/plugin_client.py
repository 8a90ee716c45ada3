"""The kubelet's connection to one device plugin (plugin/v1beta1/client.go), from Register until its stream ends."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import grpc
import grpc.aio

from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import DevicePluginStub
from qat_simulation.kubelet.pods import AdmissionError

_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0))
_T = TypeVar("_T")


class DialError(Exception):
    """The plugin's endpoint could not be reached, or did not answer GetDevicePluginOptions."""


class PluginConnection:
    """Made by a Register of `resource`; usable between `connect` and `close`."""

    def __init__(self, resource: str, path: Path) -> None:
        self.resource = resource
        self.options = pb.DevicePluginOptions()
        self._path = path
        self._channel = grpc.aio.insecure_channel(f"unix:{path}", options=_OPTIONS)
        self._stub = DevicePluginStub(self._channel)

    async def connect(self, seconds: float) -> None:
        """Dial for `seconds`, then ask for the options without a deadline, as the kubelet does. Raises DialError."""
        try:
            async with asyncio.timeout(seconds):
                await self._channel.channel_ready()
        except TimeoutError:
            raise DialError("failed to dial device plugin: context deadline exceeded") from None
        try:
            self.options = await self._call(self._stub.GetDevicePluginOptions(pb.Empty()))
        except AdmissionError as error:
            raise DialError(f"failed to get device plugin options: {error}") from error

    async def watch(self, listed: Callable[[Sequence[pb.Device]], None]) -> None:
        """Consume the ListAndWatch stream until it ends or fails."""
        with contextlib.suppress(AdmissionError):
            stream = self._stub.ListAndWatch(pb.Empty())
            while True:
                answer = await self._call(stream.read())
                if not isinstance(answer, pb.ListAndWatchResponse):  # the end of the stream
                    return
                listed(answer.devices)

    async def open_and_end_stream(self) -> None:
        """Open the ListAndWatch stream and cancel it after the first list, which no real kubelet does."""
        with contextlib.suppress(AdmissionError):
            stream = self._stub.ListAndWatch(pb.Empty())
            await self._call(stream.read())
            stream.cancel()

    async def preferred(self, available: Sequence[str], must_include: Sequence[str], size: int) -> list[str]:
        """GetPreferredAllocation for one container. Raises AdmissionError."""
        request = pb.PreferredAllocationRequest()
        request.container_requests.add(
            available_deviceIDs=available, must_include_deviceIDs=must_include, allocation_size=size
        )
        answer = await self._call(self._stub.GetPreferredAllocation(request))
        return list(answer.container_responses[0].deviceIDs) if answer.container_responses else []

    async def allocate(self, devices: Sequence[str]) -> pb.AllocateResponse:
        """Allocate for one container, without a deadline. Raises AdmissionError."""
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=devices)])
        return await self._call(self._stub.Allocate(request))

    async def close(self) -> None:
        """Close the connection; pending calls fail."""
        await self._channel.close()

    async def _call(self, call: Awaitable[_T]) -> _T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            name = error.code().name.title().replace("_", "")
            raise AdmissionError(f"rpc error: code = {name} desc = {error.details()}") from error
        except grpc.aio.UsageError as error:  # closed before the call began
            raise AdmissionError(f"rpc error: code = Canceled desc = {error}") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # grpc.aio cancels calls whose channel is closed.
            raise AdmissionError("rpc error: code = Canceled desc = grpc: the client connection is closing") from None
