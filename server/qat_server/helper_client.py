"""The server's side of the helper's socket: typed calls, many in flight, and a connection that is made again when lost.

Theory of operation: `run` (one task) connects, says Hello, then waits for the end of the connection and begins again.
Calls may come at any time; without a connection they fail at once with HelperUnavailableError, so that nobody waits
for a helper that is not there. An answer finds its caller by the request's id; a descriptor whose caller has gone is
closed.
"""

import asyncio
import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from qat_server import logs
from qat_server.audit_head import AuditWatch
from qat_server.counters import Counters
from qat_shared import VERSION
from qat_shared.codec import ProtocolError, decode_reply, encode
from qat_shared.confinement import missing
from qat_shared.messages import (
    MAX_MESSAGE,
    PROTOCOL,
    AnyReply,
    AnyRequest,
    AuditHead,
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

log = logs.get(__name__)

CALL_TIMEOUT: Final = 20.0
"""Seconds for one call: longer than any deadline of the helper's own, so its answer is the one that is heard."""
RECONNECT_FIRST: Final = 0.05
RECONNECT_LAST: Final = 1.0
SETTLED: Final = 1.0
"""Seconds that a connection has to live for the next attempt to be made at once."""

_ENDED: Final = "the connection to the helper ended"

_R = TypeVar("_R", bound=AnyReply)


class HelperError(Exception):
    """The helper did not do what was asked: `code` says which kind of refusal, `message` what to do."""

    def __init__(self, code: ErrorCode, message: str, errno: int = 0, rule: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.errno = errno
        self.rule = rule


class HelperUnavailableError(HelperError):
    """There is no connection to the helper."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, message)


class HelperSilentError(HelperError):
    """There is a connection, and no answer on it: the helper's own matter, not a device's."""

    def __init__(self, operation: str) -> None:
        super().__init__(ErrorCode.TIMED_OUT, f"the helper did not answer {operation} in {CALL_TIMEOUT:g} s")


class HelperClient:
    """One helper at one socket. `on_change` is called whenever `connected` changes."""

    def __init__(self, path: Path, counters: Counters, on_change: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._counters = counters
        self._on_change = on_change
        self._connection: _Connection | None = None
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
                self._lost(f"cannot reach the helper at {self._path}: {_sentence(error)}{hint}", say=differs)
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
            self._on_change()
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
        _close(passed)
        raise HelperError(ErrorCode.INTERNAL, "the helper said that it connected to the kubelet, but passed no socket")

    async def _call(self, make: Callable[[int], AnyRequest], expected: type[_R]) -> _R:
        connection = self._require()
        reply, passed = await self._exchange(connection, make(connection.next_id()))
        _close(passed)
        if not isinstance(reply, expected):
            raise HelperError(
                ErrorCode.INTERNAL, f"the helper answered {type(reply).__name__}, not {expected.__name__}"
            )
        return reply

    async def _exchange(self, connection: "_Connection", request: AnyRequest) -> tuple[AnyReply, int | None]:
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

    def _require(self) -> "_Connection":
        if self._connection is None:
            raise HelperUnavailableError(self.error)
        return self._connection

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            await loop.sock_connect(sock, os.fspath(self._path))
            connection = _Connection(sock, self.audit.heard)
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
        self._on_change()


class _Connection:
    """One connected socket and the calls that wait for answers on it. `heard` is given each answer's audit head."""

    def __init__(self, sock: socket.socket, heard: Callable[[AuditHead], None]) -> None:
        self._sock = sock
        self._heard = heard
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._sending = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[tuple[AnyReply, int | None]]] = {}
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(sock, self._readable)

    def next_id(self) -> int:
        return next(self._ids) % 2**32

    async def exchange(self, request: AnyRequest) -> tuple[AnyReply, int | None]:
        packet = encode(request)
        if self.ended.done():
            raise HelperUnavailableError(_ENDED)
        answer: asyncio.Future[tuple[AnyReply, int | None]] = self._loop.create_future()
        self._waiting[request.id] = answer
        try:
            async with self._sending:
                try:
                    await self._loop.sock_sendall(self._sock, packet)
                except OSError as error:
                    raise HelperUnavailableError(f"{_ENDED}: {_sentence(error)}") from error
            return await answer
        except BaseException:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                _close(answer.result()[1])
            raise
        finally:
            self._waiting.pop(request.id, None)

    def close(self) -> None:
        """Close the socket; whoever still waits is told that the connection ended."""
        self._end()
        self._sock.close()

    def _readable(self) -> None:
        while True:
            try:
                packet, descriptors, flags, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 4, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                packet, descriptors, flags = b"", [], 0
            if not packet or flags & socket.MSG_TRUNC:
                _close(*descriptors)
                self._end()
                return
            self._deliver(packet, descriptors)

    def _deliver(self, packet: bytes, passed: list[int]) -> None:
        try:
            reply = decode_reply(packet)
        except ProtocolError as error:
            log.error("helper sent what is no answer", why=str(error))
            _close(*passed)
            self._end()
            return
        self._heard(reply.audit)  # here, where answers still have the order in which they were sent
        answer = self._waiting.get(reply.id)
        if answer is None or answer.done():
            _close(*passed)
            return
        _close(*passed[1:])
        answer.set_result((reply, passed[0] if passed else None))

    def _end(self) -> None:
        # The reader goes at once: a socket at its end would be readable for ever.
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(HelperUnavailableError(_ENDED))
        if not self.ended.done():
            self.ended.set_result(None)


def _close(*descriptors: int | None) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
