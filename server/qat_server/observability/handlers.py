"""The handlers for probes, Prometheus and `qat-plugin status`.

--metrics-address has /healthz, /readyz, /metrics and /status; the local socket has only /status.
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
    ) -> None:
        self._inventory = inventory
        self._state = state
        self._open_vfs = open_vfs
        self._counters = counters

    async def serve(self, sockets: Sequence[socket]) -> None:
        """Serve all paths on listening sockets until cancelled."""
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

        return {
            "/healthz": lambda: Response(200, b"ok\n"),
            "/readyz": self._readyz,
            "/metrics": scrape,
            "/status": self._status,
        }

    async def _status(self) -> Response:
        inventory = await self._open_vfs.refreshed(self._inventory())
        return Response(200, encode(status_from(self._state(inventory))), http_server.JSON)

    def _readyz(self) -> Response:
        reasons = not_ready(self._state(self._inventory()))
        if not reasons:
            return Response(200, b"ok\n")
        return Response(503, "".join(f"{reason}\n" for reason in reasons).encode())
