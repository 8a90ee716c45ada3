"""The local status socket: its permissions, and that it replaces a stale socket but not a live one."""

import asyncio
import os
import socket
import stat
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
import uvloop

from qat_server.command_line.status.client import fetch_local
from qat_server.observability import http_server, status_socket
from qat_server.observability.http_server import Response
from qat_server.observability.status_format import STATUS_SOCKET


def test_it_is_there_for_its_user_and_group_only_while_it_is_served(tmp_path: Path) -> None:
    with status_socket.listening(tmp_path) as listener:
        assert stat.S_IMODE((tmp_path / STATUS_SOCKET).lstat().st_mode) == 0o660
        assert os.listdir(tmp_path) == [STATUS_SOCKET]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / STATUS_SOCKET))
            listener.accept()[0].close()
    assert os.listdir(tmp_path) == []


def test_a_dead_one_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / STATUS_SOCKET))
    with status_socket.listening(tmp_path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / STATUS_SOCKET))


def test_that_of_the_next_server_stays(tmp_path: Path) -> None:
    old, new = status_socket.listening(tmp_path), status_socket.listening(tmp_path)
    old.__enter__()
    with new:
        old.__exit__(None, None, None)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / STATUS_SOCKET))


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("taken_by", ["a file", "a directory with a socket of that name"])
def test_whatever_has_the_descriptor_that_it_was_bound_by_is_no_matter(
    tmp_path: Path, taken_by: str, run: Callable[[Coroutine[object, object, None]], None]
) -> None:
    """In the server that is another thread's, between the binding and the serving."""
    directory, other = tmp_path / "sockets", tmp_path / "other"
    directory.mkdir()

    async def scenario() -> None:
        with status_socket.listening(directory) as listener:
            bound_to = Path(listener.getsockname())  # /proc/self/fd/N/.qat-...
            if taken_by == "a file":
                other.touch()
            else:
                other.mkdir()
                os.link(directory / STATUS_SOCKET, other / bound_to.name)
            opened, wanted = os.open(other, os.O_RDONLY), int(bound_to.parent.name)
            os.dup2(opened, wanted)
            serving = asyncio.create_task(http_server.serve([listener], {"/status": lambda: Response(200, b"ours")}))
            try:
                assert await asyncio.to_thread(fetch_local, [directory / STATUS_SOCKET]) == b"ours"
            finally:
                serving.cancel()
                await asyncio.wait((serving,))
                for descriptor in {opened, wanted}:
                    os.close(descriptor)
        assert os.listdir(directory) == []
        assert other.is_file() or os.listdir(other) == [bound_to.name]

    run(scenario())
