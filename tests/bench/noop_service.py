"""A device plugin that answers with nothing, as plain as grpc.aio can be: what the benchmark compares with."""

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import uvloop

from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as api
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2_grpc as rpc


class Noop(rpc.DevicePluginServicer):
    async def Allocate(self, request: api.AllocateRequest, context: object) -> api.AllocateResponse:
        return api.AllocateResponse()

    async def GetDevicePluginOptions(self, request: api.Empty, context: object) -> api.DevicePluginOptions:
        return api.DevicePluginOptions()

    async def ListAndWatch(self, request: api.Empty, context: object) -> AsyncIterator[api.ListAndWatchResponse]:
        yield api.ListAndWatchResponse()

    async def PreStartContainer(
        self, request: api.PreStartContainerRequest, context: object
    ) -> api.PreStartContainerResponse:
        return api.PreStartContainerResponse()

    async def GetPreferredAllocation(
        self, request: api.PreferredAllocationRequest, context: object
    ) -> api.PreferredAllocationResponse:
        return api.PreferredAllocationResponse()


async def main(path: str) -> None:
    server = grpc.aio.server()
    rpc.add_DevicePluginServicer_to_server(Noop(), server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await asyncio.get_running_loop().create_future()


uvloop.run(main(sys.argv[1]))
