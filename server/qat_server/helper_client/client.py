"""The client of the helper's socket: typed calls, many in flight, over a connection that is restored when lost.

Theory of operation: `run` (one task) connects, sends Hello, waits for the end of the connection, and starts again.
Calls may be made at any time. Without a connection they fail at once with HelperUnavailableError, so that no caller
waits for a helper that does not run. When a connection is lost, calls in flight fail too (connection.py).
`on_change` only wakes a socket directory that waits for a helper; what is served goes on. Other parts notice at their
next call, keep what they have, and go on when `on_connected` calls them.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from msgspec import Struct

from qat_server import logs
from qat_server.helper_client.audit_head import AuditHeadMonitor
from qat_server.helper_client.connection import (
    Connection,
    HelperError,
    HelperUnavailableError,
    close_all,
    error_text,
)
from qat_server.instrumentation.counters import Counters
from qat_shared import VERSION
from qat_shared.codec import ProtocolError
from qat_shared.confinement import missing
from qat_shared.messages import (
    PROTOCOL,
    AnyReply,
    AnyRequest,
    BindDriver,
    Bound,
    Connected,
    DeviceConfig,
    Done,
    DpdkDriver,
    ErrorCode,
    Failure,
    Heartbeat,
    Hello,
    OpenPodResources,
    PrepareSocketDirectory,
    Provisioned,
    ReadDeviceConfig,
    ReadHeartbeat,
    Registered,
    RegisterResource,
    SocketDirectory,
    Welcome,
)
from qat_shared.pci import PciAddress

__all__ = ["HelperClient", "HelperError", "HelperNotRespondingError", "HelperUnavailableError"]

log = logs.get(__name__)

CALL_TIMEOUT: Final = 30.0
"""Seconds for one call. Longer than every deadline in the helper, so that the helper's own answer comes first."""
RECONNECT_FIRST: Final = 0.05
RECONNECT_LAST: Final = 1.0
STABLE_AFTER: Final = 1.0
"""A connection that lasted this many seconds resets the reconnect delay."""

_R = TypeVar("_R", bound=AnyReply)


class HelperNotRespondingError(HelperError):
    """The connected helper did not answer in time. That is a failure of the helper, not of a device."""

    def __init__(self, operation: str) -> None:
        super().__init__(ErrorCode.TIMED_OUT, f"the helper did not answer {operation} in {CALL_TIMEOUT:g} s")


class HelperState(Struct, frozen=True):
    """The last known state of the helper. `error` is why it is not connected, `sandbox` the missing part by layer.

    `audit_sequence` and `audit_hash` are the head of its audit log, `audit_broken` is how that last failed to continue.
    """

    connected: bool = False
    version: str = ""
    error: str = ""
    audit_sequence: int = 0
    audit_hash: str = ""
    audit_broken: str = ""
    sandbox: Mapping[str, str] = {}


class HelperClient:
    """One helper at one socket.

    The callbacks in `on_change` are called whenever `connected` may have changed, those in `on_connected` after them
    when a connection was made. `first_attempt_ended` is set when the first attempt to connect has succeeded or failed.
    """

    def __init__(self, path: Path, counters: Counters) -> None:
        self._path = path
        self._counters = counters
        self.on_change: list[Callable[[], None]] = []
        self.on_connected: list[Callable[[], None]] = []
        self._connection: Connection | None = None
        self.version = ""
        self.error = "the helper is not connected yet"
        self.first_attempt_ended = asyncio.Event()
        self._outage_logged = False
        self.audit = AuditHeadMonitor(counters)
        self.operations: tuple[str, ...] = ()
        self.sandbox: dict[str, str] = {}

    @property
    def connected(self) -> bool:
        """Whether there is a connection to a helper with our protocol version."""
        return self._connection is not None

    @property
    def state(self) -> HelperState:
        """The last known state of the helper."""
        head = self.audit.head
        return HelperState(
            connected=self.connected,
            version=self.version,
            error=self.error,
            audit_sequence=head.sequence if head else 0,
            audit_hash=head.hash if head else "",
            audit_broken=self.audit.last_break,
            sandbox=self.sandbox,
        )

    async def run(self) -> None:
        """Keep a connection to the helper until cancelled."""
        delay = RECONNECT_FIRST
        while True:
            if await self._connect_until_ended() > STABLE_AFTER:
                delay = RECONNECT_FIRST
            else:  # no connection, or the helper accepts each one and closes it
                await asyncio.sleep(delay)
                delay = min(delay * 2, RECONNECT_LAST)

    async def _connect_until_ended(self) -> float:
        """The seconds for which the connection lasted, 0 if there was none."""
        try:
            connection = await self._connect()
        except (OSError, HelperError, ProtocolError) as error:
            refused = isinstance(error, HelperError) and not isinstance(error, HelperUnavailableError)
            not_running = isinstance(error, FileNotFoundError | ConnectionRefusedError)
            hint = ": is qat-helper running? (--helper-socket)" if not_running else ""
            self._not_connected(
                f"cannot reach the helper at {self._path}: {error_text(error)}{hint}", log_again=refused
            )
            return 0.0
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._connection = connection
        self.error = ""
        self._outage_logged = False
        self.first_attempt_ended.set()
        log.info("helper connected", socket=str(self._path), version=self.version)
        if lacks := missing(self.sandbox):
            log.warning("the helper's sandbox is incomplete", missing=lacks)
        for notify in (*self.on_change, *self.on_connected):
            notify()
        try:
            await connection.ended
        finally:
            self._connection = None
            connection.close()
        self._not_connected(f"the helper at {self._path} closed the connection")
        return loop.time() - began

    async def bind(self, address: PciAddress, driver: DpdkDriver, reason: str) -> Bound:
        """Bind a VF to a DPDK driver. Raises HelperError."""
        return await self._call(lambda i: BindDriver(id=i, address=address, driver=driver, reason=reason), Bound)

    async def heartbeat(self, address: PciAddress) -> Heartbeat:
        """Query a PF's heartbeat. Raises HelperError."""
        return await self._call(lambda i: ReadHeartbeat(id=i, address=address), Heartbeat)

    async def device_config(self, address: PciAddress) -> DeviceConfig:
        """Read a PF's dev_cfg. Raises HelperError."""
        return await self._call(
            lambda i: ReadDeviceConfig(id=i, address=address, reason="name the resource"), DeviceConfig
        )

    async def provision(self, make: Callable[[int], AnyRequest]) -> Provisioned:
        """Carry out an operation on a PF; `make` gets the id and returns the request. Raises HelperError."""
        return await self._call(make, Provisioned)

    async def prepare_socket_directory(self, directory: SocketDirectory) -> None:
        """Create the endpoints' directory and give it to the server's group. Raises HelperError."""
        await self._call(lambda i: PrepareSocketDirectory(id=i, directory=directory, reason="serve endpoints"), Done)

    async def register_resource(self, resource: str, endpoint: str, wait_ms: int = 0) -> Registered:
        """Register a resource (its full name) with the kubelet; return the kubelet's answer. Raises HelperError.

        `endpoint`: the name of its socket in device-plugins/qat.intel.com. `wait_ms`: milliseconds for which the helper
        waits for the kubelet.
        """
        return await self._call(
            lambda i: RegisterResource(
                id=i, resource=resource, endpoint=endpoint, wait_ms=wait_ms, reason="serve the resource"
            ),
            Registered,
        )

    async def open_pod_resources(self, wait_ms: int = 0) -> socket.socket:
        """A stream socket connected to the kubelet's PodResources, which the caller must close. Raises HelperError.

        `wait_ms`: milliseconds for which the helper waits for the kubelet.
        """
        connection = self._require()
        request_id = connection.next_id()
        request = OpenPodResources(id=request_id, wait_ms=wait_ms, reason="list the devices that pods hold")
        reply, passed = await self._exchange(connection, request)
        if isinstance(reply, Connected) and passed is not None:
            try:
                return socket.socket(fileno=passed)
            except OSError:  # another kind of descriptor
                pass
        close_all(passed)
        raise HelperError(
            ErrorCode.INTERNAL, "the helper answered that it connected to the kubelet, but passed no socket"
        )

    async def _call(self, make: Callable[[int], AnyRequest], expected: type[_R]) -> _R:
        connection = self._require()
        reply, passed = await self._exchange(connection, make(connection.next_id()))
        close_all(passed)
        if not isinstance(reply, expected):
            raise HelperError(
                ErrorCode.INTERNAL, f"the helper answered {type(reply).__name__}, not {expected.__name__}"
            )
        return reply

    async def _exchange(self, connection: Connection, request: AnyRequest) -> tuple[AnyReply, int | None]:
        operation = type(request).__name__
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                reply, passed = await connection.exchange(request)
        except TimeoutError:
            self._counters.helper_request(operation, ErrorCode.TIMED_OUT)
            raise HelperNotRespondingError(operation) from None
        if isinstance(reply, Failure):
            self._counters.helper_request(operation, reply.code)
            raise HelperError(reply.code, reply.message, reply.errno, reply.rule)
        self._counters.helper_request(operation)
        return reply, passed

    def _require(self) -> Connection:
        if self._connection is None:
            raise HelperUnavailableError(self.error)
        return self._connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            await loop.sock_connect(sock, os.fspath(self._path))
            connection = Connection(sock, self.audit.update)
        except BaseException:
            sock.close()
            raise
        try:
            hello = Hello(id=connection.next_id(), protocol=PROTOCOL, version=VERSION)
            reply, _ = await self._exchange(connection, hello)
            if not isinstance(reply, Welcome) or reply.protocol != PROTOCOL:
                raise HelperError(
                    ErrorCode.PROTOCOL, "it has another protocol version: install the same version of both"
                )
        except BaseException:
            connection.close()
            raise
        self.version = reply.version
        self.operations = reply.operations
        self.sandbox = reply.sandbox
        return connection

    def _not_connected(self, error: str, *, log_again: bool = False) -> None:
        # One line for each outage, although most have two causes in turn (connection closed, no socket).
        if not self._outage_logged or (log_again and error != self.error):
            log.warning("helper not reachable", why=error)
        self._outage_logged = True
        self.error = error
        self.first_attempt_ended.set()
        for notify in self.on_change:
            notify()
