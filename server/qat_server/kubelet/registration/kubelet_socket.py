"""Registration through the kubelet's own socket: a Register call over a connection that the helper has made."""

from pathlib import Path

import grpc.aio

from qat_server.helper_client.client import HelperError
from qat_server.kubelet.device_plugin import OPTIONS
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import RegistrationStub
from qat_server.kubelet.registration.registrar import VERSION, CannotRegisterError, Timing
from qat_server.kubelet.sockets import kubelet_channel
from qat_server.kubelet.sockets.kubelet_channel import KubeletDialer
from qat_server.kubelet.watch_streams import WatchStreams
from qat_shared import NAMESPACE
from qat_shared.messages import KubeletService


class SocketRegistrar:
    """Registers one resource, whose endpoint socket is in `directory` (device-plugins/qat.intel.com)."""

    def __init__(self, name: str, directory: Path, helper: KubeletDialer, timing: Timing | None = None) -> None:
        self.socket_path = directory / f"{name}.sock"
        self._helper = helper
        self._timing = timing or Timing()
        self._request = pb.RegisterRequest(
            version=VERSION,
            endpoint=f"{NAMESPACE}/{self.socket_path.name}",
            resource_name=f"{NAMESPACE}/{name}",
            options=OPTIONS,
        )

    async def needs_new_socket(self, streams: WatchStreams) -> bool:
        """Never: Register can be called any number of times for the same socket."""
        return False

    def add_services(self, server: grpc.aio.Server) -> None:
        """Add nothing: the kubelet calls no service but DevicePlugin."""

    async def register(self, streams: WatchStreams) -> None:
        """Call Register once. Raises CannotRegisterError."""
        try:
            connected = await self._helper.open_kubelet_socket(
                KubeletService.REGISTRATION, wait_ms=round(self._timing.kubelet_wait * 1000)
            )
            async with kubelet_channel.open_channel(connected, self.socket_path.parent) as channel:
                await RegistrationStub(channel).Register(self._request, timeout=self._timing.register)
        except HelperError as error:
            raise CannotRegisterError(error.message) from error
        except OSError as error:
            raise CannotRegisterError(f"cannot connect to the kubelet: {error}") from error
        except grpc.aio.AioRpcError as error:
            raise CannotRegisterError(kubelet_channel.describe(error)) from error
