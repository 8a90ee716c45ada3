"""One server at a time: the second waits, and continues when the first has exited."""

import asyncio
import os
from pathlib import Path

from qat_server.kubelet.sockets.server_lock import server_lock
from support.conditions import until


async def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    async def second() -> None:
        order.append("second waits")
        async with server_lock(tmp_path):
            order.append("second works")

    async with server_lock(tmp_path):
        order.append("first works")
        task = asyncio.create_task(second())
        await until(lambda: "second waits" in order)
        order.append("first ends")
    await asyncio.wait_for(task, 120)
    assert order == ["first works", "second waits", "first ends", "second works"]


async def test_two_paths_of_one_directory_are_locked_once(tmp_path: Path) -> None:
    """For example if the helper's socket is in the endpoints' directory."""
    (tmp_path / "also").symlink_to(tmp_path)
    async with asyncio.timeout(120), server_lock(tmp_path, tmp_path / "also") as descriptor:
        assert os.path.samestat(os.fstat(descriptor), os.stat(tmp_path))
        assert os.listdir(tmp_path) == ["also"]
