"""The two ways to register with the kubelet, and the directory of the endpoints' sockets in each."""

from enum import StrEnum
from pathlib import Path
from typing import Final

from msgspec import Struct

from qat_server.devices.naming import LONGEST_NAME
from qat_shared import NAMESPACE
from qat_shared.messages import SocketDirectory


class Registration(StrEnum):
    """How the kubelet learns of the resources."""

    KUBELET_SOCKET = "kubelet-socket"
    PLUGIN_WATCHER = "plugin-watcher"

    @property
    def socket_directory(self) -> SocketDirectory:
        """The kubelet's directory that contains ours, as the helper's protocol names it."""
        return _LOCATIONS[self].directory


class _Location(Struct, frozen=True):
    """One of the kubelet's directories: its name in the helper's protocol, its file name, our longest socket name."""

    directory: SocketDirectory
    name: str
    longest_socket: str


_LOCATIONS: Final = {
    Registration.KUBELET_SOCKET: _Location(SocketDirectory.DEVICE_PLUGINS, "device-plugins", f"{LONGEST_NAME}.sock"),
    Registration.PLUGIN_WATCHER: _Location(
        SocketDirectory.PLUGINS_REGISTRY, "plugins_registry", f"{LONGEST_NAME}-01234567.sock"
    ),
}


def socket_directory(kubelet_dir: Path, registration: Registration) -> Path:
    """The directory of the endpoints' sockets, below the kubelet's directory."""
    return kubelet_dir / _LOCATIONS[registration].name / NAMESPACE


def longest_socket(kubelet_dir: Path, registration: Registration) -> Path:
    """The longest path that an endpoint's socket can have."""
    return socket_directory(kubelet_dir, registration) / _LOCATIONS[registration].longest_socket
