"""An HTTP server of the product on a port of this machine, while a block runs."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

from qat_server.observability.http_server import listen


@asynccontextmanager
async def serving(
    serve: Callable[[list[socket.socket]], Coroutine[object, object, None]], send_buffer: int | None = None
) -> AsyncIterator[int]:
    """Run `serve` on a listening socket. Yields its port; at the end the socket must be closed."""
    (sock,) = listen("127.0.0.1", 0)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # connections inherit it
    port: int = sock.getsockname()[1]
    task = asyncio.create_task(serve([sock]))
    try:
        yield port
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert sock.fileno() == -1
