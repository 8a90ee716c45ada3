"""The two ways to register with the kubelet, and the directory that the endpoints' sockets are in for each."""

from enum import StrEnum
from pathlib import Path
from typing import Final

from msgspec import Struct

from qat_shared import NAMESPACE
from qat_shared.messages import SocketDirectory

# The longest name that a QAT device's services make: three of sym, asym, dc, dcc, decomp (Gen6).
_LONGEST_RESOURCE: Final = "asym-decomp-sym"


class Registration(StrEnum):
    """How the kubelet learns of the resources."""

    KUBELET_SOCKET = "kubelet-socket"
    PLUGIN_WATCHER = "plugin-watcher"

    @property
    def socket_directory(self) -> SocketDirectory:
        """The kubelet's directory that holds ours, as the helper's protocol names it."""
        return _PLACES[self].directory


class _Place(Struct, frozen=True):
    """The helper's word for a directory of the kubelet, its name there, and the longest name of a socket in it."""

    directory: SocketDirectory
    name: str
    longest_socket: str


_PLACES: Final = {
    Registration.KUBELET_SOCKET: _Place(SocketDirectory.DEVICE_PLUGINS, "device-plugins", f"{_LONGEST_RESOURCE}.sock"),
    Registration.PLUGIN_WATCHER: _Place(
        SocketDirectory.PLUGINS_REGISTRY, "plugins_registry", f"{_LONGEST_RESOURCE}-01234567.sock"
    ),
}


def socket_directory(kubelet_dir: Path, registration: Registration) -> Path:
    """The directory of the endpoints' sockets."""
    return kubelet_dir / _PLACES[registration].name / NAMESPACE


def longest_socket(kubelet_dir: Path, registration: Registration) -> Path:
    """The longest path that an endpoint's socket can have."""
    return socket_directory(kubelet_dir, registration) / _PLACES[registration].longest_socket
