"""Registration by the kubelet's plugin watcher: it finds the socket, asks what it is, and says whether it takes it.

Facts of the kubelet (pkg/kubelet/pluginmanager, v1.36): it watches plugins_registry and every directory in it, looks
once a second, and ignores names that begin with a dot. It asks again only when a name has appeared anew, or when it
has restarted. The endpoint is then dialled as any other; an empty one is the socket that it has found.

A path that has failed is tried again with pauses up to two minutes, and a kubelet that starts before we do finds what
a killed server has left. So each life of an endpoint has a socket name of its own, whose account with the kubelet is
clean; within one life the name stays, since the kubelet never forgets a failed one.
"""

# ruff: noqa: N802 - the RPCs' names are the protocol's

import asyncio
import secrets
from pathlib import Path
from typing import Final, TypeAlias

import grpc.aio

from qat_server.device_plugin import Streams
from qat_server.generated import pluginregistration_v1_pb2 as pb
from qat_server.generated.pluginregistration_v1_pb2_grpc import RegistrationServicer, add_RegistrationServicer_to_server
from qat_server.naming import NAMESPACE
from qat_server.registration import VERSION, CannotRegisterError, Timing

TYPE: Final = "DevicePlugin"
_LONGEST_REASON: Final = 500

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"


class WatcherRegistrar(RegistrationServicer):
    """For one resource, whose socket is in `directory`: plugins_registry/qat.intel.com."""

    afresh = True

    def __init__(self, name: str, directory: Path, timing: Timing | None = None) -> None:
        self.socket_path = directory / socket_name(name)
        self._timing = timing or Timing()
        # The registration socket is the endpoint: no path, which the kubelet might see as another one than we do.
        self._info = pb.PluginInfo(type=TYPE, name=f"{NAMESPACE}/{name}", endpoint="", supported_versions=[VERSION])
        self._verdict: asyncio.Future[str] | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the plugin registration service."""
        add_RegistrationServicer_to_server(self, server)

    async def register(self, streams: Streams) -> None:
        """Wait for the kubelet's word. Raises CannotRegisterError."""
        if streams.fresh:  # the kubelet has been here meanwhile, whatever it said before
            return
        opened, ended = streams.opened, streams.ended
        self._verdict = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._timing.found):
                refusal = await self._verdict
        except TimeoutError:
            if streams.opened > opened and streams.ended == ended:  # its word was lost
                return
            why = f"the kubelet has not asked at {self.socket_path}: is it running?"
            raise CannotRegisterError(why) from None
        finally:
            self._verdict = None
        if refusal:
            raise CannotRegisterError(refusal)

    async def GetInfo(self, request: pb.InfoRequest, context: Context) -> pb.PluginInfo:
        """The kubelet has found the socket."""
        return self._info

    async def NotifyRegistrationStatus(
        self, request: pb.RegistrationStatus, context: Context
    ) -> pb.RegistrationStatusResponse:
        """The kubelet's word: it has connected to the endpoint, or will not."""
        if self._verdict is not None and not self._verdict.done():
            refusal = request.error[:_LONGEST_REASON] or "no reason given"
            self._verdict.set_result("" if request.plugin_registered else f"the kubelet refused: {refusal}")
        return pb.RegistrationStatusResponse()


def socket_name(name: str) -> str:
    """A name for a resource's socket that was not used before."""
    return f"{name}-{secrets.token_hex(4)}.sock"
