"""Registration through the kubelet's own socket: the helper calls Register, and the answer is decoded here."""

from pathlib import Path
from typing import Protocol

import grpc.aio

from qat_server.helper_client.client import HelperError
from qat_server.kubelet.registration.answer import refusal
from qat_server.kubelet.registration.registrar import CannotRegisterError, Timing
from qat_server.kubelet.watch_streams import WatchStreams
from qat_shared import NAMESPACE
from qat_shared.messages import Registered


class Registering(Protocol):
    """Registers resources, as the helper's client does."""

    async def register_resource(self, resource: str, endpoint: str, wait_ms: int = 0) -> Registered:
        """Register a resource (its full name) whose socket is `endpoint`. Raises HelperError."""


class SocketRegistrar:
    """Registers one resource, whose endpoint socket is in `directory` (device-plugins/qat.intel.com)."""

    def __init__(self, name: str, directory: Path, helper: Registering, timing: Timing | None = None) -> None:
        self.socket_path = directory / f"{name}.sock"
        self._resource = f"{NAMESPACE}/{name}"
        self._helper = helper
        self._timing = timing or Timing()

    async def needs_new_socket(self, streams: WatchStreams) -> bool:
        """Never: Register can be called any number of times for the same socket."""
        return False

    def add_services(self, server: grpc.aio.Server) -> None:
        """Add nothing: the kubelet calls no service but DevicePlugin."""

    async def register(self, streams: WatchStreams) -> None:
        """Have Register called once. Raises CannotRegisterError."""
        wait_ms = round(self._timing.kubelet_wait * 1000)
        try:
            registered = await self._helper.register_resource(self._resource, self.socket_path.name, wait_ms)
        except HelperError as error:
            raise CannotRegisterError(error.message) from error
        if not registered.accepted:
            raise CannotRegisterError(refusal(registered.answer))
