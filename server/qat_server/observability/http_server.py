"""A minimal HTTP/1.1 server: GET and HEAD of the fixed paths that it is given (handlers.py has them).

h11 implements the protocol; this module does the I/O and limits the resources that a client can use:

    request head     8 KiB, within 5 s of its first byte (for the first request: 5 s of connecting)
    connections      16 for each call of `serve`, and 8 for each address; beyond that, a new one replaces the one (of
                     that address, if it has 8) that has waited longest for a request
    pipelining       the event loop has a turn between two requests of a connection
    keep-alive       75 s between requests
    request body     never read: the connection is closed after the response
    slow reader      must read the response within 5 s

Without connections there are no timers, and the only task is the one that waits for cancellation.
"""

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import h11
from msgspec import Struct

from qat_server import logs
from qat_server.observability import unix_server

log = logs.get(__name__)

HEAD_LIMIT: Final = 8 * 1024
MAX_CONNECTIONS: Final = 16
MAX_PER_ADDRESS: Final = 8  # so that no address can keep the kubelet's probes out
HEAD_SECONDS: Final = 5.0
IDLE_SECONDS: Final = 75.0  # more than Prometheus' usual minute between scrapes
ANSWER_SECONDS: Final = 5.0
_CLOSE: Final = ("Connection", "close")
TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"


class Response(Struct, frozen=True):
    """A response: status code, body, and the body's content type."""

    status: int
    body: bytes
    content_type: str = TEXT


Handler = Callable[[], Response | Awaitable[Response]]
"""Makes the response for one path. It is called in the event loop, so slow work must be awaited."""


class Limits(Struct, frozen=True):
    """Limits for clients, in numbers and seconds. Tests shorten them."""

    connections: int = MAX_CONNECTIONS
    per_address: int = MAX_PER_ADDRESS
    head_seconds: float = HEAD_SECONDS
    idle_seconds: float = IDLE_SECONDS
    answer_seconds: float = ANSWER_SECONDS


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address of `host`, "" for all addresses. Raises OSError, leaving none open."""
    if not host:
        if socket.has_dualstack_ipv6():
            return [socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)]
        return [socket.create_server(("", port))]
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        absent = OSError(errno.EADDRNOTAVAIL, f"{host!r} has no address")
        for family, place in _resolved(host, port):
            try:
                sockets.append(opened.enter_context(socket.create_server(place, family=family)))
            except OSError as error:
                # localhost may resolve to ::1 on a node without IPv6.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error
        if not sockets:
            raise absent
        opened.pop_all()
    return sockets


def _resolved(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [(family, (str(place[0]), int(place[1]))) for family, _, _, _, place in dict.fromkeys(found)]


async def serve(
    sockets: Sequence[socket.socket], handlers: Mapping[str, Handler], limits: Limits | None = None
) -> None:
    """Serve on `sockets` until cancelled, then close them and all connections."""
    async with asyncio.TaskGroup() as group, contextlib.AsyncExitStack() as servers:
        endpoint = _Endpoint(handlers, limits or Limits(), group)
        for sock in sockets:
            start = unix_server.start if sock.family == socket.AF_UNIX else asyncio.start_server
            server = await start(endpoint.connected, sock=sock, limit=HEAD_LIMIT)
            servers.callback(server.close)
        log.info("status endpoint open", addresses=[_name(sock) for sock in sockets], paths=sorted(handlers))
        await asyncio.get_running_loop().create_future()


class _Endpoint:
    def __init__(self, handlers: Mapping[str, Handler], limits: Limits, group: asyncio.TaskGroup) -> None:
        self._handlers = handlers
        self._limits = limits
        self._group = group
        self._open: dict[asyncio.StreamWriter, str] = {}  # with the client's address; "" on a Unix socket
        self._waiting: dict[asyncio.StreamWriter, None] = {}  # for a request; longest wait first

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Accept a connection, or drop it if every connection that could give way has a request in progress."""
        name = writer.get_extra_info("peername")
        address = str(name[0]) if isinstance(name, tuple) else ""
        same = [each for each, theirs in self._open.items() if theirs == address]
        crowded = bool(address) and len(same) >= self._limits.per_address
        if crowded or len(self._open) >= self._limits.connections:
            victim = next((each for each in self._waiting if not crowded or each in same), writer)
            self._forget(victim)
            victim.transport.abort()
            if victim is writer:
                return
        self._open[writer] = address
        self._group.create_task(self._connection(reader, writer))

    def _forget(self, writer: asyncio.StreamWriter) -> None:
        self._open.pop(writer, None)
        self._waiting.pop(writer, None)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conn = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)
        try:
            seconds = self._limits.head_seconds
            while True:
                self._waiting[writer] = None
                event = await self._event(conn, reader, seconds)
                self._waiting.pop(writer, None)
                if not isinstance(event, h11.Request):
                    return
                response, extra = await self._answer(event)
                # The body is not read, so the connection ends with this response.
                if any(name in (b"content-length", b"transfer-encoding") for name, _ in event.headers):
                    extra.append(_CLOSE)
                await self._send(conn, writer, response, extra, head_only=event.method == b"HEAD")
                if conn.our_state is not h11.DONE:
                    return
                conn.next_event()  # the end of the request
                conn.start_next_cycle()
                await asyncio.sleep(0)  # requests that are received already are answered without any other await
                # The next request may have started in the same packet.
                seconds = self._limits.head_seconds if conn.trailing_data[0] else self._limits.idle_seconds
        except h11.RemoteProtocolError as error:
            with contextlib.suppress(h11.LocalProtocolError, OSError, TimeoutError):
                bad = Response(error.error_status_hint, f"{error}\n".encode("ascii", "backslashreplace"))
                await self._send(conn, writer, bad, [_CLOSE])
        except (OSError, TimeoutError):
            pass  # the client disconnected or was too slow
        except Exception:  # the outermost edge of a connection: a defect must not end the process that serves devices
            log.exception("connection failed")
        finally:
            self._forget(writer)
            await self._close(writer)

    async def _event(self, conn: h11.Connection, reader: asyncio.StreamReader, seconds: float) -> object:
        loop = asyncio.get_running_loop()
        begun = False
        async with asyncio.timeout(seconds) as limit:
            while True:
                event = conn.next_event()
                if event is not h11.NEED_DATA:
                    return event
                data = await reader.read(HEAD_LIMIT)
                if not begun and seconds > self._limits.head_seconds:
                    limit.reschedule(loop.time() + self._limits.head_seconds)
                begun = True
                conn.receive_data(data)

    async def _answer(self, request: h11.Request) -> tuple[Response, list[tuple[str, str]]]:
        path = request.target.partition(b"?")[0].decode("ascii", "replace")
        handler = self._handlers.get(path)
        if request.http_version not in (b"1.0", b"1.1"):
            return Response(505, b"only HTTP/1.0 and HTTP/1.1 are supported\n"), [_CLOSE]
        if handler is None:
            return Response(404, f"not found; the paths are {', '.join(sorted(self._handlers))}\n".encode()), []
        if request.method not in (b"GET", b"HEAD"):
            return Response(405, b"only GET and HEAD are supported\n"), [("Allow", "GET, HEAD")]
        try:
            made = handler()
            return (made if isinstance(made, Response) else await made), []
        except Exception:  # a defect in one handler must not end the process that serves devices
            log.exception("request failed", path=path)
            return Response(500, b"internal error; see the log\n"), []

    async def _send(
        self,
        conn: h11.Connection,
        writer: asyncio.StreamWriter,
        response: Response,
        extra: list[tuple[str, str]],
        *,
        head_only: bool = False,
    ) -> None:
        headers = [
            ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            ("Cache-Control", "no-store"),
            *extra,
        ]
        head = conn.send(h11.Response(status_code=response.status, headers=headers))
        body = b"" if head_only else conn.send(h11.Data(data=response.body))
        end = conn.send(h11.EndOfMessage())
        writer.write((head or b"") + (body or b"") + (end or b""))
        async with asyncio.timeout(self._limits.answer_seconds):
            await writer.drain()

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        """Close the connection; unsent data has `answer_seconds` to be sent.

        It is not aborted once closed: asyncio's transport, unlike uvloop's, raises AttributeError then.
        """
        try:
            writer.close()
            async with asyncio.timeout(self._limits.answer_seconds):
                await writer.wait_closed()
        except TimeoutError:
            writer.transport.abort()
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        except OSError:
            pass  # the connection is lost already


def _name(sock: socket.socket) -> str:
    if sock.family == socket.AF_UNIX:
        return "unix"
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"
