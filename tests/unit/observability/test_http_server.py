"""The HTTP server over real sockets: answers, refusals, and the limits for hostile clients."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from qat_server.observability.http_server import JSON, Handler, Limits, Response, listen, serve
from support.http_endpoint import serving

DEADLINE = 120.0


def broken() -> Response:
    raise RuntimeError("a defect")


HANDLERS: dict[str, Handler] = {
    "/healthz": lambda: Response(200, b"ok\n"),
    "/readyz": lambda: Response(503, b"no helper\nno device\n"),
    "/status": lambda: Response(200, b"{}", JSON),
    "/large": lambda: Response(200, b"x" * 8_000_000),
    "/medium": lambda: Response(200, b"x" * 60_000),
    "/broken": broken,
}


def endpoint(limits: Limits | None = None, send_buffer: int | None = None) -> AbstractAsyncContextManager[int]:
    return serving(lambda sockets: serve(sockets, HANDLERS, limits), send_buffer)


async def exchange(port: int, request: bytes, *, half_close: bool = False) -> bytes:
    """Send bytes and read until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(DEADLINE):
        writer.write(request)
        if half_close:
            writer.write_eof()
        answer = await reader.read(-1)
        writer.close()
    return answer


def request(path: str, method: str = "GET", *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: n", "Connection: close", *headers, "", ""]).encode()


ANSWERS: dict[str, tuple[bytes, int, bytes | None]] = {
    "GET": (request("/healthz"), 200, b"ok\n"),
    "reasons": (request("/readyz"), 503, b"no helper\nno device\n"),
    "JSON": (request("/status"), 200, b"{}"),
    "query": (request("/healthz?verbose=1"), 200, b"ok\n"),
    "HTTP/1.0": (b"GET /healthz HTTP/1.0\r\n\r\n", 200, b"ok\n"),
    "HEAD": (request("/healthz", "HEAD"), 200, b""),
    "HEAD of an unknown path": (request("/nothing", "HEAD"), 404, b""),
    "not found": (request("/nothing"), 404, None),
    "not found, no text": (request("/%ff%00"), 404, None),
    "path that climbs": (request("/../../etc/passwd"), 404, None),
    "POST": (request("/healthz", "POST"), 405, None),
    "POST with a body": (request("/healthz", "POST", "Content-Length: 3") + b"abc", 405, None),
    "POST without the body it promised": (request("/healthz", "POST", "Content-Length: 3000000"), 405, None),
    "GET with a body": (request("/healthz", "GET", "Content-Length: 3") + b"abc", 200, b"ok\n"),
    "DELETE": (request("/status", "DELETE"), 405, None),
    "defect": (request("/broken"), 500, b"internal error; see the log\n"),
    "no HTTP": (b"hello\r\n\r\n", 400, None),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, None),
    "no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400, None),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, None),
    "two lengths": (request("/healthz", "GET", "Content-Length: 3", "Content-Length: 4"), 400, None),
    "forged header": (b"GET /healthz HTTP/1.1\r\nHost: n\r\nbad header\x00: x\r\n\r\n", 400, None),
    "head too large": (b"GET /healthz HTTP/1.1\r\nHost: n\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", 431, None),
    "path too long": (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", 431, None),
}


@pytest.mark.parametrize(("sent", "status", "body"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_answers(sent: bytes, status: int, body: bytes | None) -> None:
    async with endpoint() as port:
        head, _, answered = (await exchange(port, sent)).partition(b"\r\n\r\n")

    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    if body is not None:
        assert answered == body


async def test_headers() -> None:
    async with endpoint() as port:
        status = await exchange(port, request("/status"))
        refused = await exchange(port, request("/status", "POST"))
        head = await exchange(port, request("/status", "HEAD"))

    assert b"\r\nContent-Type: application/json\r\nContent-Length: 2\r\nCache-Control: no-store\r\n" in status
    assert b"\r\nAllow: GET, HEAD\r\n" in refused
    assert b"\r\nContent-Length: 2\r\n" in head


async def test_defect_of_the_endpoint_ends_its_connection_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with endpoint() as port:
        with monkeypatch.context() as patched:
            patched.setattr("qat_server.observability.http_server.time.strftime", None)
            assert await exchange(port, request("/healthz")) == b""
        assert (await exchange(port, request("/healthz"))).endswith(b"ok\n")

    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["connection failed"]


async def test_defect_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with endpoint() as port:
        await exchange(port, request("/broken"))
        assert (await exchange(port, request("/healthz"))).startswith(b"HTTP/1.1 200 ")

    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.message == "request failed"


async def test_kept_alive_and_pipelined() -> None:
    async with endpoint() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        ask = b"GET /healthz HTTP/1.1\r\nHost: n\r\n\r\n"
        async with asyncio.timeout(DEADLINE):
            for _ in range(3):
                writer.write(ask)
                assert (await reader.readuntil(b"ok\n")).startswith(b"HTTP/1.1 200 ")
            writer.write(ask * 5 + request("/healthz"))
            rest = await reader.read(-1)
        writer.close()

    assert rest.count(b"HTTP/1.1 200 ") == 6


async def test_large_answer_arrives_whole() -> None:
    async with endpoint() as port:
        answer = await exchange(port, request("/large"))

    assert len(answer.partition(b"\r\n\r\n")[2]) == 8_000_000


async def test_answer_still_being_sent_at_the_close_arrives_whole() -> None:
    """It is below asyncio's high-water mark, so that drain() returns at once, but above the socket's buffer."""
    async with endpoint(send_buffer=4096) as port:
        for _ in range(3):
            answer = await exchange(port, request("/medium"))
            assert len(answer.partition(b"\r\n\r\n")[2]) == 60_000


SILENT: dict[str, bytes] = {
    "nothing sent": b"",
    "half a request": b"GET /healthz HTTP/1.1\r\nHo",
    "half a second request": b"GET /healthz HTTP/1.1\r\nHost: n\r\n\r\nGET /",
}


@pytest.mark.parametrize("sent", SILENT.values(), ids=SILENT.keys())
async def test_silent_client_is_closed(sent: bytes) -> None:
    async with endpoint(Limits(head_seconds=1.0, idle_seconds=60)) as port:
        answer = await exchange(port, sent)

    assert answer.count(b"HTTP/1.1 200 ") == sent.count(b"\r\n\r\n")


async def test_idle_connection_is_closed() -> None:
    async with endpoint(Limits(idle_seconds=0.05)) as port:
        answer = await exchange(port, b"GET /healthz HTTP/1.1\r\nHost: n\r\n\r\n")

    assert answer.endswith(b"ok\n")


async def test_half_closed_client_gets_its_answer() -> None:
    async with endpoint() as port:
        assert (await exchange(port, request("/healthz"), half_close=True)).endswith(b"ok\n")
        assert await exchange(port, b"", half_close=True) == b""
        assert (await exchange(port, b"GET /h", half_close=True)).startswith(b"HTTP/1.1 400 ")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.001)


async def test_client_that_does_not_read_is_dropped() -> None:
    async with endpoint(Limits(answer_seconds=0.5)) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, request("/large"))
            await until(connected)
            await until(lambda: not connected())
        assert (await exchange(port, request("/healthz"))).endswith(b"ok\n")


def connected() -> bool:
    return any("_connection" in str(task.get_coro()) for task in asyncio.all_tasks())


async def test_waiting_clients_give_way_to_a_new_one() -> None:
    async with endpoint(Limits(connections=4)) as port:
        waiting = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
        for _ in range(3):
            assert (await exchange(port, request("/healthz"))).endswith(b"ok\n")
        async with asyncio.timeout(DEADLINE):
            with contextlib.suppress(ConnectionResetError):
                assert await waiting[0][0].read() == b""
        for _, writer in waiting:
            writer.close()


async def test_cancelling_closes_open_connections() -> None:
    async with endpoint() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: n\r\n\r\n")
        async with asyncio.timeout(DEADLINE):
            await reader.readuntil(b"ok\n")
    async with asyncio.timeout(DEADLINE):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()


def test_listen_on_taken_port_fails() -> None:
    (first,) = listen("127.0.0.1", 0)
    with first, pytest.raises(OSError, match="Address already in use"):
        listen("127.0.0.1", first.getsockname()[1])


def test_listen_everywhere() -> None:
    (sock,) = listen("", 0)
    with sock, socket.create_connection(("127.0.0.1", sock.getsockname()[1]), timeout=DEADLINE):
        pass


def test_listen_on_unknown_host_fails() -> None:
    with pytest.raises(OSError):
        listen("no-such-host.invalid", 0)


def test_listen_where_one_of_two_addresses_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    (sock,) = listen("localhost", 0)
    sock.close()
    del found[1]
    with pytest.raises(OSError):
        listen("localhost", 0)
