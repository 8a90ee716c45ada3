"""The server's side of the helper's socket: typed calls, many in flight, and a connection that is made again when lost.

Theory of operation: `run` (one task) connects, says Hello, then waits for the end of the connection and begins again.
Calls may come at any time; without a connection they fail at once with HelperUnavailableError, so that nobody waits
for a helper that is not there.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from msgspec import Struct

from qat_server import logs
from qat_server.helper_client.audit_head import AuditWatch
from qat_server.helper_client.connection import (
    Connection,
    HelperError,
    HelperUnavailableError,
    close_all,
    sentence,
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
    KubeletService,
    OpenKubeletSocket,
    PrepareSocketDirectory,
    Provisioned,
    ReadDeviceConfig,
    ReadHeartbeat,
    SocketDirectory,
    Welcome,
)
from qat_shared.pci import PciAddress

__all__ = ["HelperClient", "HelperError", "HelperSilentError", "HelperUnavailableError"]

log = logs.get(__name__)

CALL_TIMEOUT: Final = 20.0
"""Seconds for one call: longer than any deadline of the helper's own, so its answer is the one that is heard."""
RECONNECT_FIRST: Final = 0.05
RECONNECT_LAST: Final = 1.0
SETTLED: Final = 1.0
"""Seconds that a connection has to live for the next attempt to be made at once."""

_R = TypeVar("_R", bound=AnyReply)


class HelperSilentError(HelperError):
    """There is a connection, and no answer on it: the helper's own matter, not a device's."""

    def __init__(self, operation: str) -> None:
        super().__init__(ErrorCode.TIMED_OUT, f"the helper did not answer {operation} in {CALL_TIMEOUT:g} s")


class HelperState(Struct, frozen=True):
    """The helper as last heard of; `audit_*` is its audit log's head, and how that last failed to continue it.

    `sandbox`: by layer, what is missing of it.
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

    `on_change` are called whenever `connected` may have changed, then `on_connected` when a connection was made.
    """

    def __init__(self, path: Path, counters: Counters) -> None:
        self._path = path
        self._counters = counters
        self.on_change: list[Callable[[], None]] = []
        self.on_connected: list[Callable[[], None]] = []
        self._connection: Connection | None = None
        self.version = ""
        self.error = "the helper is not connected yet"
        self.tried = asyncio.Event()
        """Set once the first attempt to connect has ended, however."""
        self._told = False
        self.audit = AuditWatch(counters)
        self.operations: tuple[str, ...] = ()
        self.sandbox: dict[str, str] = {}

    @property
    def connected(self) -> bool:
        """Whether the helper is there and speaks our protocol."""
        return self._connection is not None

    @property
    def state(self) -> HelperState:
        """The helper as last heard of."""
        head = self.audit.head
        return HelperState(
            connected=self.connected,
            version=self.version,
            error=self.error,
            audit_sequence=head.sequence if head else 0,
            audit_hash=head.hash if head else "",
            audit_broken=self.audit.broken,
            sandbox=self.sandbox,
        )

    async def run(self) -> None:
        """Keep the connection up until cancelled."""
        delay = RECONNECT_FIRST
        while True:
            try:
                connection = await self._connect()
            except (OSError, HelperError, ProtocolError) as error:
                differs = isinstance(error, HelperError) and not isinstance(error, HelperUnavailableError)
                nobody = isinstance(error, FileNotFoundError | ConnectionRefusedError)
                hint = ": is qat-helper running? (--helper-socket)" if nobody else ""
                self._lost(f"cannot reach the helper at {self._path}: {sentence(error)}{hint}", say=differs)
                await asyncio.sleep(delay)
                delay = min(delay * 2, RECONNECT_LAST)
                continue
            began = asyncio.get_running_loop().time()
            self._connection = connection
            self.error = ""
            self._told = False
            self.tried.set()
            log.info("helper connected", socket=str(self._path), version=self.version)
            if lacks := missing(self.sandbox):
                log.warning("the helper's sandbox is not whole", missing=lacks)
            for notify in (*self.on_change, *self.on_connected):
                notify()
            try:
                await connection.ended
            finally:
                self._connection = None
                connection.close()
            self._lost(f"the helper at {self._path} closed the connection")
            if asyncio.get_running_loop().time() - began > SETTLED:
                delay = RECONNECT_FIRST
            else:  # it welcomes us and hangs up: not again and again without a pause
                await asyncio.sleep(delay)
                delay = min(delay * 2, RECONNECT_LAST)

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
        """Carry out an operation on a PF; `make` is given the request's id. Raises HelperError."""
        return await self._call(make, Provisioned)

    async def prepare_socket_directory(self, directory: SocketDirectory) -> None:
        """Have the endpoints' directory made and given to the server's group. Raises HelperError."""
        await self._call(lambda i: PrepareSocketDirectory(id=i, directory=directory, reason="serve endpoints"), Done)

    async def open_kubelet_socket(self, service: KubeletService, wait_ms: int = 0) -> socket.socket:
        """A stream socket connected to the kubelet, which the caller closes. Raises HelperError."""
        connection = self._require()
        request_id = connection.next_id()
        request = OpenKubeletSocket(
            id=request_id, service=service, wait_ms=wait_ms, reason=f"speak to the kubelet: {service}"
        )
        reply, passed = await self._exchange(connection, request)
        if isinstance(reply, Connected) and passed is not None:
            try:
                return socket.socket(fileno=passed)
            except OSError:  # some other kind of descriptor
                pass
        close_all(passed)
        raise HelperError(ErrorCode.INTERNAL, "the helper said that it connected to the kubelet, but passed no socket")

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
            raise HelperSilentError(operation) from None
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
            connection = Connection(sock, self.audit.heard)
        except BaseException:
            sock.close()
            raise
        try:
            hello = Hello(id=connection.next_id(), protocol=PROTOCOL, version=VERSION)
            reply, _ = await self._exchange(connection, hello)
            if not isinstance(reply, Welcome) or reply.protocol != PROTOCOL:
                raise HelperError(
                    ErrorCode.PROTOCOL, "it does not speak our protocol: install the same version of both"
                )
        except BaseException:
            connection.close()
            raise
        self.version = reply.version
        self.operations = reply.operations
        self.sandbox = reply.sandbox
        return connection

    def _lost(self, error: str, *, say: bool = False) -> None:
        # One line for an outage, though it mostly has two causes in turn (connection closed, no socket).
        if not self._told or (say and error != self.error):
            log.warning("helper not reachable", why=error)
        self._told = True
        self.error = error
        self.tried.set()
        for notify in self.on_change:
            notify()
