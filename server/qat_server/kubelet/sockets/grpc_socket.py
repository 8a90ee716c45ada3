"""A gRPC server at a path: bound to a temporary name and then renamed, so that the path is always a usable socket.

gRPC unlinks the path that it was bound to, at some time after the server has stopped. With the final path, a server
that exits could remove the socket of the next one; after the rename there is nothing for it to remove. The rename also
replaces a stale socket in one step, and no client can connect before the mode is set.
"""

import asyncio
import os
from pathlib import Path

import grpc.aio

from qat_server.kubelet.sockets.socket_files import BoundSocket, move_into_place, temporary_path


async def start(server: grpc.aio.Server, path: Path, mode: int) -> BoundSocket:
    """Start `server` at `path`, replacing any socket that was there. Raises OSError."""
    with temporary_path(path.parent) as temporary:
        try:
            server.add_insecure_port(f"unix:{temporary}")
        except RuntimeError as error:  # gRPC does not pass the errno on
            writable = os.access(os.path.dirname(temporary), os.W_OK | os.X_OK)
            why = str(error) if writable else "no write permission"
            raise OSError(f"cannot make a socket in {path.parent}: {why}") from error
        os.chmod(temporary, mode)
        await server.start()
        return move_into_place(temporary, path)


async def stop(server: grpc.aio.Server, grace: float) -> None:
    """Stop `server`; RPCs in progress get `grace` seconds to finish.

    gRPC waits with asyncio.wait_for, which before Python 3.12 loses a cancellation that arrives as the wait ends.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    await server.stop(grace)
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
