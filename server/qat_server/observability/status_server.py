"""What the server answers to those who ask after it: probes, Prometheus, `qat-plugin status`.

/healthz, /readyz, /metrics and /status on --metrics-address; on the local socket /status alone.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import socket

from qat_server.devices.inventory import Inventory
from qat_server.devices.open_vfs import FreshUse
from qat_server.instrumentation.counters import Counters
from qat_server.observability import http_server as http_endpoint
from qat_server.observability import status_socket
from qat_server.observability.http_server import Handler, Response
from qat_server.observability.status import State, encode, status_from


class Pages:
    """`inventory` is the newest; `state` is what is known, with an inventory as FreshUse gives it."""

    def __init__(
        self,
        sysfs_root: Path,
        inventory: Callable[[], Inventory],
        state: Callable[[Inventory], State],
        not_ready: Callable[[], Sequence[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inventory = inventory
        self._state = state
        self._not_ready = not_ready
        self._fresh_use = FreshUse(sysfs_root, clock)

    async def serve(self, sockets: Sequence[socket], counters: Counters) -> None:
        """All pages, on sockets that listen, until cancelled."""
        await http_endpoint.serve(sockets, self._handlers(counters))

    async def serve_status(self, directory: Path) -> None:
        """The status alone, on a socket in `directory`, whether or not there is a --metrics-address."""
        with status_socket.listening(directory) as local:
            await http_endpoint.serve([local], {"/status": self._status})

    def _handlers(self, counters: Counters) -> dict[str, Handler]:
        from qat_server.observability import metrics  # noqa: PLC0415 - prometheus_client only where metrics are wanted

        scraped = self._inventory()
        registry = metrics.registry(lambda: self._state(scraped), counters)

        async def answer() -> Response:
            nonlocal scraped
            scraped = await self._fresh_use.of(self._inventory())
            return Response(200, metrics.text(registry), metrics.CONTENT_TYPE)

        return {
            "/healthz": lambda: Response(200, b"ok\n"),
            "/readyz": self._readyz,
            "/metrics": answer,
            "/status": self._status,
        }

    async def _status(self) -> Response:
        inventory = await self._fresh_use.of(self._inventory())
        return Response(200, encode(status_from(self._state(inventory))), http_endpoint.JSON)

    def _readyz(self) -> Response:
        reasons = self._not_ready()
        if not reasons:
            return Response(200, b"ok\n")
        return Response(503, "".join(f"{reason}\n" for reason in reasons).encode())
