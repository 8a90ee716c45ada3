"""The messages between server and helper: all requests and all replies.

One message is one packet on a Unix SEQPACKET socket: msgpack, tagged by its type, at most 64 KiB; unknown fields are
refused (codec.py). A client sends Hello first; a helper with another protocol replies with a Failure that names both
versions. The client chooses each request's id; the reply repeats it. Replies may arrive in another order than the
requests, so that a slow device delays no other. No request holds a path or bytes to write; the only file name in one
is that of a socket in the server's own directory (RegisterResource).
"""

from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from qat_shared.pci import PciAddress

PROTOCOL: Final = 2
MAX_MESSAGE: Final = 64 * 1024
"""The longest message in bytes, in either direction."""

RequestId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Reason = Annotated[str, Meta(max_length=64, pattern=r"\A[ !#-\[\]-~]*\Z")]
"""Printable ASCII without quotes and backslashes: the audit log need not escape it, so escaping cannot lengthen it."""
WaitMs = Annotated[int, Meta(ge=0, le=10_000)]
Resource = Annotated[str, Meta(pattern=r"\A[a-z0-9.-]{1,63}/[A-Za-z0-9._-]{1,63}\Z")]
"""A full resource name, of any plugin: policy denies those that are not ours, so that the audit log names them."""
SocketName = Annotated[str, Meta(pattern=r"\A[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?\.sock\Z")]
"""The name of a socket file, neither hidden nor in another directory."""


class DpdkDriver(StrEnum):
    """The drivers to which a VF may be bound."""

    VFIO_PCI = "vfio-pci"
    IGB_UIO = "igb_uio"


DPDK_DRIVERS: Final = tuple(DpdkDriver)


class Service(StrEnum):
    """The services of a PF, in the order of writing: kernels before 6.4 accept sym;asym but not asym;sym."""

    SYM = "sym"
    ASYM = "asym"
    DC = "dc"
    DECOMP = "decomp"
    DCC = "dcc"


class SocketDirectory(StrEnum):
    """The kubelet's directories in which the helper may create one for the server's sockets."""

    DEVICE_PLUGINS = "device-plugins"
    PLUGINS_REGISTRY = "plugins-registry"


class ErrorCode(StrEnum):
    """Why an operation was not done. The Failure's message says what to do."""

    MALFORMED = "malformed"  # the message could not be decoded
    PROTOCOL = "protocol"  # no Hello, or helper and server have different protocols
    DENIED = "denied"  # by policy: Failure.rule names the rule
    BUSY = "busy"  # in use, or an earlier operation on it has not finished
    VANISHED = "vanished"  # no such device, or it was removed during the operation
    UNAVAILABLE = "unavailable"  # the kubelet does not answer, or a file of the driver does not exist
    UNSUPPORTED = "unsupported"  # the kubelet runs, but does not have the service
    KERNEL = "kernel"  # the kernel refused: Failure.errno
    TIMED_OUT = "timed-out"  # not finished within the deadline; it may still complete
    AUDIT = "audit"  # the audit log cannot be written, so nothing is done
    INTERNAL = "internal"  # a bug in the helper


class Request(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op"):
    """The fields of every request: the reply repeats `id`; `reason` goes to the audit log."""

    id: RequestId
    reason: Reason = ""


class Hello(Request, frozen=True, kw_only=True, tag="Hello"):
    """The first message: the client's protocol and version. Answer: Welcome."""

    protocol: Annotated[int, Meta(ge=0, le=2**31)]
    version: Annotated[str, Meta(max_length=40)]


class BindDriver(Request, frozen=True, kw_only=True, tag="BindDriver"):
    """Bind a VF of the device table to a DPDK driver; unbind it from its kernel VF driver if needed. Answer: Bound."""

    address: PciAddress
    driver: DpdkDriver


class ReleaseDriver(Request, frozen=True, kw_only=True, tag="ReleaseDriver"):
    """Return a VF to the driver that the kernel chooses. Answer: Bound."""

    address: PciAddress


class ReadHeartbeat(Request, frozen=True, kw_only=True, tag="ReadHeartbeat"):
    """Query the heartbeat of a PF's firmware. Answer: Heartbeat."""

    address: PciAddress


class ReadDeviceConfig(Request, frozen=True, kw_only=True, tag="ReadDeviceConfig"):
    """Read a PF's dev_cfg in debugfs. Answer: DeviceConfig."""

    address: PciAddress


class SetServices(Request, frozen=True, kw_only=True, tag="SetServices"):
    """Change a PF's services: down, write, up (restored on failure). Removes its VFs. Answer: Provisioned."""

    address: PciAddress
    services: Annotated[tuple[Service, ...], Meta(min_length=1, max_length=3)]


class SetPmIdle(Request, frozen=True, kw_only=True, tag="SetPmIdle"):
    """Set a PF's pm_idle_enabled: down, write, up unless `stay_down`. Removes its VFs. Answer: Provisioned."""

    address: PciAddress
    on: bool
    stay_down: bool = False


class SetAutoReset(Request, frozen=True, kw_only=True, tag="SetAutoReset"):
    """Set a PF's auto_reset. Answer: Provisioned."""

    address: PciAddress
    on: bool


class SetNumVfs(Request, frozen=True, kw_only=True, tag="SetNumVfs"):
    """Enable a PF's VFs (QAT drivers enable all) without a driver, or with 0 remove them. Answer: Provisioned."""

    address: PciAddress
    count: Annotated[int, Meta(ge=0, le=0xFFFF)]


class PrepareSocketDirectory(Request, frozen=True, kw_only=True, tag="PrepareSocketDirectory"):
    """Create qat.intel.com in a directory of the kubelet, writable by the server's group. Answer: Done."""

    directory: SocketDirectory = SocketDirectory.DEVICE_PLUGINS


class RegisterResource(Request, frozen=True, kw_only=True, tag="RegisterResource"):
    """Register a resource with the kubelet, waiting up to `wait_ms` for the kubelet to listen. Answer: Registered.

    `endpoint` is the socket's name in the kubelet's device-plugins/qat.intel.com.
    """

    resource: Resource
    endpoint: SocketName
    wait_ms: WaitMs = 0


class OpenPodResources(Request, frozen=True, kw_only=True, tag="OpenPodResources"):
    """Connect to the kubelet's PodResources service, waiting up to `wait_ms` for it. Answer: Connected.

    The answer carries one descriptor. The helper shuts the connection down when too many newer ones are open
    (qat_helper/passed.py), and when the client's own connection ends.
    """

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
    | RegisterResource
    | OpenPodResources
)


class AuditHead(Struct, frozen=True, forbid_unknown_fields=True):
    """The last line of the audit log when a reply was sent: its sequence number and SHA-256 (hex)."""

    sequence: int
    hash: str


class Reply(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="reply"):
    """The fields of every reply."""

    id: RequestId
    audit: AuditHead


class Welcome(Reply, frozen=True, kw_only=True, tag="Welcome"):
    """The helper's protocol and version, and the operations that its policy allows this client.

    `sandbox`: by layer, why it is missing, "" when it is in place.
    """

    protocol: int
    version: str
    operations: tuple[str, ...]
    sandbox: dict[str, str] = {}


class Done(Reply, frozen=True, kw_only=True, tag="Done"):
    """The operation is done and has no result."""


class Bound(Reply, frozen=True, kw_only=True, tag="Bound"):
    """The VF's driver now (None: none), and whether the operation changed anything."""

    driver: str | None
    changed: bool


class Provisioned(Reply, frozen=True, kw_only=True, tag="Provisioned"):
    """The attribute's value before and now; equal when nothing was changed."""

    before: str
    now: str


class Heartbeat(Reply, frozen=True, kw_only=True, tag="Heartbeat"):
    """`alive` is False when the first line of heartbeat/status was -1."""

    alive: bool


class DeviceConfig(Reply, frozen=True, kw_only=True, tag="DeviceConfig"):
    """The text of dev_cfg, 32 KiB at most."""

    text: str


class Registered(Reply, frozen=True, kw_only=True, tag="Registered"):
    """The kubelet has answered. `accepted`: with a message, which it sends only if it has registered the resource.

    `answer`: the HTTP/2 frames of its answer, 16 KiB at most. They hold its reason if it has not.
    """

    accepted: bool
    answer: bytes


class Connected(Reply, frozen=True, kw_only=True, tag="Connected"):
    """The packet carries the connected stream socket as SCM_RIGHTS."""


class Failure(Reply, frozen=True, kw_only=True, tag="Failure"):
    """The operation was not done. `message`: a sentence for people; `errno`: the kernel's; `rule`: the policy's."""

    code: ErrorCode
    message: str
    errno: int = 0
    rule: str = ""


AnyReply = Welcome | Done | Bound | Provisioned | Heartbeat | DeviceConfig | Registered | Connected | Failure
