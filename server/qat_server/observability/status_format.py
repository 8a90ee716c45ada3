"""The format of /status, which the server encodes and `qat-plugin status` and `doctor` decode."""

from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Struct

from qat_server.helper_client.client import HelperState

STATUS_SOCKET: Final = ".status.sock"
"""The name of the local status socket in the directory of the endpoints' sockets."""


class PfStatus(Struct, frozen=True):
    """One PF. `vfs`: the number of enabled VFs. `reason`: why it is unhealthy, "" if it is healthy."""

    address: str
    device: str
    driver: str
    numa_node: int | None
    state: str
    services: str
    total_vfs: int
    vfs: int
    reason: str


class VfStatus(Struct, frozen=True):
    """One VF. `resource`: its resource's name, "" if unknown. `reason`: why it is unhealthy or not listed."""

    address: str
    device: str
    pf: str
    driver: str
    numa_node: int | None
    resource: str
    listed: bool
    reason: str
    in_use: bool | None
    pod: str


class ResourceStatus(Struct, frozen=True):
    """One resource as listed to the kubelet; `name` is without the namespace."""

    name: str
    capacity: int
    allocatable: int
    registered: bool
    registrations: int
    error: str


class ProvisioningStatus(Struct, frozen=True):
    """One PF's progress. `stage`: done, working, waiting, busy, failed or impossible. `held_by`: holders of its VFs."""

    pf: str
    stage: str
    wanted: str
    steps: tuple[str, ...]
    held_by: tuple[str, ...]
    reason: str


class Status(Struct, frozen=True):
    """The whole of /status."""

    version: str
    ready: bool
    not_ready: tuple[str, ...]
    helper: HelperState
    pfs: tuple[PfStatus, ...]
    vfs: tuple[VfStatus, ...]
    resources: tuple[ResourceStatus, ...]
    problems: tuple[str, ...]
    cut: tuple[str, ...]
    provisioning: tuple[ProvisioningStatus, ...] = ()
    provisioning_error: str = ""
    sandbox: Mapping[str, str] = {}


def encode(status: Status) -> bytes:
    """The JSON of /status."""
    return msgspec.json.encode(status) + b"\n"


def decode(text: bytes) -> Status:
    """Decode /status, ignoring fields of later versions. Raises msgspec.MsgspecError or UnicodeDecodeError."""
    return msgspec.json.decode(text, type=Status)
