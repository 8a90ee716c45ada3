"""The messages between server and helper: every request there is, and every answer.

One message is one packet of a Unix SEQPACKET socket, msgpack, tagged by its kind, unknown fields refused, 64 KiB at
most (codec.py). A client says Hello first; a helper of another protocol answers with a Failure that names both
versions. Requests carry an id of the client's choosing; answers repeat it and may come in another order than the
requests, since a device that answers slowly holds up no other. No request holds a path, a file name or bytes to write.
"""

from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from qat_shared.pci import PciAddress

PROTOCOL: Final = 1
MAX_MESSAGE: Final = 64 * 1024
"""The longest message in bytes, either way."""

RequestId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Reason = Annotated[str, Meta(max_length=200)]
WaitMs = Annotated[int, Meta(ge=0, le=10_000)]


class DpdkDriver(StrEnum):
    """The drivers that a VF may be bound to."""

    VFIO_PCI = "vfio-pci"
    IGB_UIO = "igb_uio"


DPDK_DRIVERS: Final = tuple(DpdkDriver)


class Service(StrEnum):
    """The services of a PF. In this order they are written: kernels before 6.4 know sym;asym, and not asym;sym."""

    SYM = "sym"
    ASYM = "asym"
    DC = "dc"
    DECOMP = "decomp"
    DCC = "dcc"


class KubeletService(StrEnum):
    """The sockets of the kubelet that the helper may connect to."""

    REGISTRATION = "registration"
    POD_RESOURCES = "pod-resources"


class SocketDirectory(StrEnum):
    """The kubelet's directories in which the helper may make one for the server's sockets."""

    DEVICE_PLUGINS = "device-plugins"
    PLUGINS_REGISTRY = "plugins-registry"


class ErrorCode(StrEnum):
    """What kept an operation from being done. The Failure's message says what to do."""

    MALFORMED = "malformed"  # the message could not be read
    PROTOCOL = "protocol"  # Hello was not said, or helper and server differ
    DENIED = "denied"  # by policy: Failure.rule names the rule
    BUSY = "busy"  # in use, or an earlier operation on it has not ended
    VANISHED = "vanished"  # no such device, or it went away meanwhile
    UNAVAILABLE = "unavailable"  # the kubelet's socket, or a file of the driver, is not there
    KERNEL = "kernel"  # the kernel refused: Failure.errno
    TIMED_OUT = "timed-out"  # not done within the deadline; it may still come to pass
    AUDIT = "audit"  # the audit log cannot be written, so nothing is done
    INTERNAL = "internal"  # a defect of the helper


class Request(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op"):
    """What every request carries: `id` comes back in the answer, `reason` goes to the audit log."""

    id: RequestId
    reason: Reason = ""


class Hello(Request, frozen=True, kw_only=True, tag="Hello"):
    """First of all: the client's protocol and version. Answer: Welcome."""

    protocol: Annotated[int, Meta(ge=0, le=2**31)]
    version: Annotated[str, Meta(max_length=40)]


class BindDriver(Request, frozen=True, kw_only=True, tag="BindDriver"):
    """Bind a VF of the device table to a DPDK driver, taking it from its kernel VF driver if need be. Answer: Bound."""

    address: PciAddress
    driver: DpdkDriver


class ReleaseDriver(Request, frozen=True, kw_only=True, tag="ReleaseDriver"):
    """Give a VF back to the driver of the kernel's own choice. Answer: Bound."""

    address: PciAddress


class ReadHeartbeat(Request, frozen=True, kw_only=True, tag="ReadHeartbeat"):
    """Have a PF's firmware answer a heartbeat query. Answer: Heartbeat."""

    address: PciAddress


class ReadDeviceConfig(Request, frozen=True, kw_only=True, tag="ReadDeviceConfig"):
    """Read a PF's dev_cfg in debugfs. Answer: DeviceConfig."""

    address: PciAddress


class SetServices(Request, frozen=True, kw_only=True, tag="SetServices"):
    """Give a PF other services: down, write, up, or back to the old ones. Its VFs go. Answer: Provisioned."""

    address: PciAddress
    services: Annotated[tuple[Service, ...], Meta(min_length=1, max_length=3)]


class SetPmIdle(Request, frozen=True, kw_only=True, tag="SetPmIdle"):
    """Set a PF's pm_idle_enabled: down, write, up unless it is to `stay_down`. Its VFs go. Answer: Provisioned."""

    address: PciAddress
    on: bool
    stay_down: bool = False


class SetAutoReset(Request, frozen=True, kw_only=True, tag="SetAutoReset"):
    """Set a PF's auto_reset. Answer: Provisioned."""

    address: PciAddress
    on: bool


class SetNumVfs(Request, frozen=True, kw_only=True, tag="SetNumVfs"):
    """Enable a PF's VFs, left to no driver (the QAT driver enables all), or with 0 remove them. Answer: Provisioned."""

    address: PciAddress
    count: Annotated[int, Meta(ge=0, le=0xFFFF)]


class PrepareSocketDirectory(Request, frozen=True, kw_only=True, tag="PrepareSocketDirectory"):
    """Make qat.intel.com in a directory of the kubelet, usable by the server's group. Answer: Done."""

    directory: SocketDirectory = SocketDirectory.DEVICE_PLUGINS


class OpenKubeletSocket(Request, frozen=True, kw_only=True, tag="OpenKubeletSocket"):
    """Connect to a socket of the kubelet, waiting up to `wait_ms` for it to be there.

    Answer: Connected, with one descriptor.
    """

    service: KubeletService
    wait_ms: WaitMs = 0


AnyRequest = (
    Hello
    | BindDriver
    | ReleaseDriver
    | ReadHeartbeat
    | ReadDeviceConfig
    | SetServices
    | SetPmIdle
    | SetAutoReset
    | SetNumVfs
    | PrepareSocketDirectory
    | OpenKubeletSocket
)


class AuditHead(Struct, frozen=True, forbid_unknown_fields=True):
    """The last line of the audit log when an answer was sent: its sequence number and SHA-256 (hex)."""

    sequence: int
    hash: str


class Reply(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="reply"):
    """What every answer carries."""

    id: RequestId
    audit: AuditHead


class Welcome(Reply, frozen=True, kw_only=True, tag="Welcome"):
    """The helper's protocol and version, and the operations that its policy allows this client.

    `sandbox` says of each of its layers what is missing, "" when nothing is.
    """

    protocol: int
    version: str
    operations: tuple[str, ...]
    sandbox: dict[str, str] = {}


class Done(Reply, frozen=True, kw_only=True, tag="Done"):
    """It is done, and there is nothing to tell."""


class Bound(Reply, frozen=True, kw_only=True, tag="Bound"):
    """The driver that the VF has now (None: none), and whether anything had to be changed."""

    driver: str | None
    changed: bool


class Provisioned(Reply, frozen=True, kw_only=True, tag="Provisioned"):
    """What the attribute showed before, and what it shows now. Equal when nothing had to be changed."""

    before: str
    now: str


class Heartbeat(Reply, frozen=True, kw_only=True, tag="Heartbeat"):
    """`alive` is False when the first line of heartbeat/status was -1."""

    alive: bool


class DeviceConfig(Reply, frozen=True, kw_only=True, tag="DeviceConfig"):
    """The text of dev_cfg, 32 KiB at most."""

    text: str


class Connected(Reply, frozen=True, kw_only=True, tag="Connected"):
    """The packet carries the connected stream socket as SCM_RIGHTS."""


class Failure(Reply, frozen=True, kw_only=True, tag="Failure"):
    """It was not done. `message` is one sentence for a person; `errno` the kernel's answer; `rule` the policy's."""

    code: ErrorCode
    message: str
    errno: int = 0
    rule: str = ""


AnyReply = Welcome | Done | Bound | Provisioned | Heartbeat | DeviceConfig | Connected | Failure
