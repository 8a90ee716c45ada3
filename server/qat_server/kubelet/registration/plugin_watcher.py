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
import contextlib
import secrets
from pathlib import Path
from typing import Final, TypeAlias

import grpc.aio

from qat_server.kubelet.generated import pluginregistration_v1_pb2 as pb
from qat_server.kubelet.generated.pluginregistration_v1_pb2_grpc import (
    RegistrationServicer,
    add_RegistrationServicer_to_server,
)
from qat_server.kubelet.registration.registrar import VERSION, CannotRegisterError, Timing
from qat_server.kubelet.watch_streams import WatchStreams
from qat_shared import NAMESPACE

TYPE: Final = "DevicePlugin"
_LONGEST_REASON: Final = 500

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"


class WatcherRegistrar(RegistrationServicer):
    """For one resource, whose socket is in `directory`: plugins_registry/qat.intel.com."""

    def __init__(self, name: str, directory: Path, timing: Timing | None = None) -> None:
        self.socket_path = directory / socket_name(name)
        self._timing = timing or Timing()
        # The registration socket is the endpoint: no path, which the kubelet might see as another one than we do.
        self._info = pb.PluginInfo(type=TYPE, name=f"{NAMESPACE}/{name}", endpoint="", supported_versions=[VERSION])
        self._asked = asyncio.Event()
        self._refusal: str | None = None  # the kubelet's word, until `register` has taken it; empty: it is registered
        self._word = asyncio.Event()

    async def needs_new_socket(self, streams: WatchStreams) -> bool:
        """Unless a kubelet comes by itself, which a new socket would make start all over."""
        if not streams.fresh:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timing.by_itself):
                    await self._asked.wait()
        return not streams.fresh and not self._asked.is_set()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the plugin registration service; whatever was said at an older socket counts no more."""
        self._forget()
        add_RegistrationServicer_to_server(self, server)

    async def register(self, streams: WatchStreams) -> None:
        """Wait for the kubelet's word. Raises CannotRegisterError."""
        try:
            if streams.fresh:  # the kubelet has been here meanwhile, whatever it said before
                return
            refusal = await self._answer(streams)
        finally:
            self._forget()
        if refusal:
            raise CannotRegisterError(refusal)

    async def _answer(self, streams: WatchStreams) -> str:
        """The kubelet's word. Raises CannotRegisterError when none comes."""
        opened, ended = streams.opened, streams.ended
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.found):
                await self._word.wait()
        if self._refusal is not None:
            return self._refusal
        if streams.opened > opened and streams.ended == ended:  # its word was lost
            return ""
        raise CannotRegisterError(f"the kubelet has not asked at {self.socket_path}: is it running?")

    def _forget(self) -> None:
        self._asked.clear()
        self._hear(None)

    def _hear(self, refusal: str | None) -> None:
        self._refusal = refusal
        if refusal is None:
            self._word.clear()
        else:
            self._word.set()

    async def GetInfo(self, request: pb.InfoRequest, context: Context) -> pb.PluginInfo:
        """The kubelet has found the socket, and is about to connect: what it said before counts no more."""
        self._asked.set()
        self._hear(None)
        return self._info

    async def NotifyRegistrationStatus(
        self, request: pb.RegistrationStatus, context: Context
    ) -> pb.RegistrationStatusResponse:
        """The kubelet's word: it has connected to the endpoint, or will not."""
        if self._asked.is_set() and self._refusal is None:
            refusal = request.error[:_LONGEST_REASON] or "no reason given"
            self._hear("" if request.plugin_registered else f"the kubelet refused: {refusal}")
        return pb.RegistrationStatusResponse()


def socket_name(name: str) -> str:
    """A name for a resource's socket that was not used before."""
    return f"{name}-{secrets.token_hex(4)}.sock"
