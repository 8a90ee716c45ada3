"""Registration through the kubelet's plugin watcher: it finds the socket, calls GetInfo, and reports the result.

How the kubelet behaves (pkg/kubelet/pluginmanager, v1.36): it watches plugins_registry and every directory in it,
reconciles once a second, and ignores names that begin with a dot. It calls GetInfo again only after a name has
reappeared, or after its own restart. It then dials the endpoint as any other; an empty endpoint means the socket
that it has found.

The kubelet retries a path that has failed after up to two minutes, and a kubelet that starts before the server finds
the sockets of a killed one. So each Endpoint uses a socket name that was not used before, with no failures recorded in
the kubelet. The Endpoint then keeps its name, since the kubelet never forgets a failed path.
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
    """Registers one resource, whose endpoint socket is in `directory` (plugins_registry/qat.intel.com)."""

    def __init__(self, name: str, directory: Path, timing: Timing | None = None) -> None:
        self.socket_path = directory / socket_name(name)
        self._timing = timing or Timing()
        # The registration socket is also the endpoint. No path is given: the kubelet may see it at another path.
        self._info = pb.PluginInfo(type=TYPE, name=f"{NAMESPACE}/{name}", endpoint="", supported_versions=[VERSION])
        self._info_requested = asyncio.Event()
        self._status_received = asyncio.Event()
        self._refusal = ""  # valid while a status is received; "" means that the kubelet has registered the plugin

    async def needs_new_socket(self, streams: WatchStreams) -> bool:
        """Not if a kubelet reconnects on its own: a new socket would make it register all over again."""
        if not streams.fresh:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timing.reconnect):
                    await self._info_requested.wait()
        return not streams.fresh and not self._info_requested.is_set()

    def add_services(self, server: grpc.aio.Server) -> None:
        """Add the plugin registration service; calls on an older socket no longer count."""
        self._reset()
        add_RegistrationServicer_to_server(self, server)

    async def register(self, streams: WatchStreams) -> None:
        """Wait for the kubelet's registration status. Raises CannotRegisterError."""
        try:
            if streams.fresh:  # the kubelet has connected meanwhile, whatever status it sent before
                return
            refusal = await self._wait_for_status(streams)
        finally:
            self._reset()
        if refusal:
            raise CannotRegisterError(refusal)

    async def _wait_for_status(self, streams: WatchStreams) -> str:
        """The kubelet's reason to refuse, "" if it has registered the plugin. Raises CannotRegisterError."""
        opened, ended = streams.opened, streams.ended
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.discovery):
                await self._status_received.wait()
        if self._status_received.is_set():
            return self._refusal
        if streams.opened > opened and streams.ended == ended:  # connected, but its status was lost
            return ""
        raise CannotRegisterError(f"the kubelet has not called GetInfo at {self.socket_path}: is it running?")

    def _reset(self) -> None:
        self._info_requested.clear()
        self._status_received.clear()

    async def GetInfo(self, request: pb.InfoRequest, context: Context) -> pb.PluginInfo:
        """The kubelet has found the socket and is about to connect; a status that it sent before no longer counts."""
        self._info_requested.set()
        self._status_received.clear()
        return self._info

    async def NotifyRegistrationStatus(
        self, request: pb.RegistrationStatus, context: Context
    ) -> pb.RegistrationStatusResponse:
        """The kubelet has connected to the endpoint, or refuses to. Only the first status after GetInfo counts."""
        if self._info_requested.is_set() and not self._status_received.is_set():
            reason = request.error[:_LONGEST_REASON] or "no reason given"
            self._refusal = "" if request.plugin_registered else f"the kubelet refused: {reason}"
            self._status_received.set()
        return pb.RegistrationStatusResponse()


def socket_name(name: str) -> str:
    """A name for a resource's socket that was not used before."""
    return f"{name}-{secrets.token_hex(4)}.sock"
