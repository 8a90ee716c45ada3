"""The handlers for probes, Prometheus and `qat-plugin status`.

--metrics-address has /healthz, /readyz and /metrics, which name no pod and no path, and no device but PFs: whoever
reaches the port can read them. The local socket has only /status. --status-http puts /status, and the reasons of
/readyz, on --metrics-address too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from socket import socket

from qat_server.devices.inventory import Inventory
from qat_server.devices.open_vfs import OpenVfs
from qat_server.instrumentation.counters import Counters
from qat_server.observability import http_server, status_socket
from qat_server.observability.http_server import Handler, Response
from qat_server.observability.readiness import not_ready
from qat_server.observability.state import State
from qat_server.observability.status_format import encode
from qat_server.observability.status_report import status_from


class HttpHandlers:
    """Serves snapshots: `inventory` returns the newest inventory, `state` the current State for a given inventory."""

    def __init__(
        self,
        inventory: Callable[[], Inventory],
        state: Callable[[Inventory], State],
        open_vfs: OpenVfs,
        counters: Counters,
        *,
        status_http: bool = False,
    ) -> None:
        self._inventory = inventory
        self._state = state
        self._open_vfs = open_vfs
        self._counters = counters
        self._status_http = status_http

    async def serve(self, sockets: Sequence[socket]) -> None:
        """Serve what the network may read on listening sockets until cancelled."""
        await http_server.serve(sockets, self._handlers())

    async def serve_locally(self, directory: Path) -> None:
        """Serve only /status on a socket in `directory` until cancelled, with or without --metrics-address."""
        with status_socket.listening(directory) as local:
            await http_server.serve([local], {"/status": self._status})

    def _handlers(self) -> dict[str, Handler]:
        from qat_server.observability import metrics  # noqa: PLC0415 - prometheus_client, only with --metrics-address

        scraped = self._inventory()
        registry = metrics.registry(lambda: self._state(scraped), self._counters)

        async def scrape() -> Response:
            nonlocal scraped
            scraped = await self._open_vfs.refreshed(self._inventory())
            return Response(200, metrics.text(registry), metrics.CONTENT_TYPE)

        handlers: dict[str, Handler] = {
            "/healthz": lambda: Response(200, b"ok\n"),
            "/readyz": self._readyz,
            "/metrics": scrape,
        }
        if self._status_http:
            handlers["/status"] = self._status
        return handlers

    async def _status(self) -> Response:
        inventory = await self._open_vfs.refreshed(self._inventory())
        return Response(200, encode(status_from(self._state(inventory))), http_server.JSON)

    def _readyz(self) -> Response:
        reasons = not_ready(self._state(self._inventory()))
        if not reasons:
            return Response(200, b"ok\n")
        if not self._status_http:
            return Response(503, b"not ready: `qat-plugin status` on the node shows the reasons\n")
        return Response(503, "".join(f"{reason}\n" for reason in reasons).encode())
