"""One server at a time: the second waits, and goes on when the first has ended."""

import asyncio
import os
from pathlib import Path

from qat_server.kubelet.sockets.server_lock import only_server
from support.conditions import until


async def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    async def second() -> None:
        order.append("second asks")
        async with only_server(tmp_path):
            order.append("second works")

    async with only_server(tmp_path):
        order.append("first works")
        task = asyncio.create_task(second())
        await until(lambda: "second asks" in order)
        order.append("first ends")
    await asyncio.wait_for(task, 120)
    assert order == ["first works", "second asks", "first ends", "second works"]


async def test_two_directories_that_are_one_are_locked_once(tmp_path: Path) -> None:
    """As where the helper's socket is among those of the endpoints."""
    (tmp_path / "also").symlink_to(tmp_path)
    async with asyncio.timeout(120), only_server(tmp_path, tmp_path / "also") as descriptor:
        assert os.path.samestat(os.fstat(descriptor), os.stat(tmp_path))
        assert os.listdir(tmp_path) == ["also"]
