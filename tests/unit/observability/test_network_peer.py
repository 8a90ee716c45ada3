"""What a peer on the network sees at --metrics-address, and what it cannot hold up there."""

import asyncio
import re
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from qat_server.devices.open_vfs import OpenVfs
from qat_server.helper_client.client import HelperState
from qat_server.instrumentation.counters import Counters
from qat_server.observability.handlers import HttpHandlers
from qat_server.observability.http_server import Handler, Limits, Response, serve
from qat_server.observability.state import State
from support.http_endpoint import serving
from support.server_state import PF, VFS, provisioning_state

DEADLINE = 120.0
PODS, PATH = "default/pod/main", "/run/qat-plugin/helper.sock"
PATHS = ("/healthz", "/readyz", "/metrics", "/status", "/nothing")


def telling() -> State:
    """A state with a reason of every kind."""
    return replace(
        provisioning_state(),
        helper=HelperState(False, "0.1.0", f"cannot reach the helper at {PATH}", 17, "ab" * 32, "it went back"),
        holders_unknown=f"the kubelet does not answer at {PATH}",
        working=(PF,),
        configured=False,
        sandbox={"landlock": f"no rule for {PATH}"},
    )


def served(*, status_http: bool) -> AbstractAsyncContextManager[int]:
    state = telling()
    open_vfs = OpenVfs(Path("/nonexistent"), read=lambda _, inventory: inventory)
    handlers = HttpHandlers(lambda: state.inventory, lambda _: state, open_vfs, Counters(), status_http=status_http)
    return serving(handlers.serve)


async def get(port: int, path: str, source: str = "127.0.0.1") -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    async with asyncio.timeout(DEADLINE):
        writer.write(f"GET {path} HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read(-1)).decode().partition("\r\n\r\n")
        writer.close()
    return int(head.split()[1]) if head else 0, body


async def test_a_network_peer_reads_no_pod_no_path_no_reason_and_no_vf() -> None:
    async with served(status_http=False) as port:
        pages = {path: await get(port, path) for path in PATHS}
    assert {path: status for path, (status, _) in pages.items()} == {
        "/healthz": 200, "/readyz": 503, "/metrics": 200, "/status": 404, "/nothing": 404
    }  # fmt: skip
    text = "".join(body for _, body in pages.values())
    assert set(re.findall(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", text)) == {str(PF)}, "PFs only"
    for secret in (PODS, PATH, "refused", "cannot reach", "went back", "qat.conf", *map(str, VFS)):
        assert secret not in text
    values = {
        value
        for family in text_string_to_metric_families(pages["/metrics"][1])
        for sample in family.samples
        for value in sample.labels.values()
    }
    assert all(re.fullmatch(r"[\w.;:+-]*", value) for value in values), (
        "labels are words, neither names of pods nor paths"
    )


async def test_with_status_http_it_reads_all_of_it() -> None:
    async with served(status_http=True) as port:
        status, text = await get(port, "/status")
        assert status == 200
        assert all(secret in text for secret in (PODS, PATH, str(VFS[0])))
        status, text = await get(port, "/readyz")
        assert (status, PATH in text) == (503, True)


def endpoint(handlers: dict[str, Handler], limits: Limits | None = None) -> AbstractAsyncContextManager[int]:
    return serving(lambda sockets: serve(sockets, handlers, limits))


async def test_one_address_cannot_take_all_connections() -> None:
    """It has a request in progress on each of its connections, so that none would give way to the kubelet's probe."""
    busy = asyncio.Event()

    async def slow() -> Response:
        await busy.wait()
        return Response(200, b"ok\n")

    async with endpoint({"/slow": slow, "/healthz": lambda: Response(200, b"ok\n")}) as port:
        flood = [await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0)) for _ in range(40)]
        for _, writer in flood:
            writer.write(b"GET /slow HTTP/1.1\r\nHost: n\r\n\r\n")
        try:
            for _ in range(3):
                assert await get(port, "/healthz") == (200, "ok\n")
        finally:
            busy.set()
            for _, writer in flood:
                writer.close()


async def test_requests_of_one_packet_hold_nothing_else_up_for_longer_than_one_of_them() -> None:
    turns = 0
    seen: list[int] = []

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    def handler() -> Response:
        seen.append(turns)
        return Response(200, b"ok\n")

    async with endpoint({"/metrics": handler}) as port:
        task = asyncio.create_task(others())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(DEADLINE):
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: n\r\n\r\n" * 100)
            for _ in range(100):
                await reader.readuntil(b"ok\n")
        writer.close()
        task.cancel()
    assert len(seen) == len(set(seen)) == 100


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "CONNECT", "PUT", "get", "QUIT"])
async def test_other_methods_are_refused(method: str) -> None:
    async with endpoint({"/healthz": lambda: Response(200, b"secret\n")}) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(DEADLINE):
            writer.write(f"{method} /healthz HTTP/1.1\r\nHost: n\r\nX-Echo: back\r\nConnection: close\r\n\r\n".encode())
            answer = (await reader.read(-1)).decode()
        writer.close()
    assert answer.startswith("HTTP/1.1 405 ")
    assert "secret" not in answer
    assert "back" not in answer
