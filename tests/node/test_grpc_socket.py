"""Leftover sockets of gRPC, and a cancellation that gRPC loses."""

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import cast

import grpc.aio
import pytest

from qat_server.kubelet.sockets import grpc_socket
from qat_server.kubelet.sockets.socket_files import remove_leftovers


async def test_leftovers_of_a_killed_server_are_removed(directory: Path) -> None:
    left = directory / ".qat-abcdefgh"
    left.mkdir()
    (left / "s").touch()
    (directory / ".qat-12345678").touch()
    (directory / "cy.sock").touch()
    for name in ("dead.sock", ".hidden"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(directory / name))
    (directory / "link.sock").symlink_to("dead.sock")
    remove_leftovers(directory)
    assert sorted(os.listdir(directory)) == ["cy.sock", "link.sock"], "files that are not sockets are not ours"


async def test_a_cancellation_that_grpc_loses_is_not_lost() -> None:
    class Losing:
        async def stop(self, grace: float) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    task = asyncio.create_task(grpc_socket.stop(cast("grpc.aio.Server", Losing()), 0.2))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
