"""SIGKILL between any two writes of the helper: the operation still gets done, and the log shows the interruption.

The server is the real one. It binds every VF that it finds on its kernel driver; bound is the wanted state here.
"""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from helper_security.chain import interrupted, verified
from helper_security.figures import tried
from helper_security.writes import Killer, Writes
from qat_shared.messages import ReleaseDriver
from qat_shared.pci import PciAddress
from qat_simulation.kernel.kernel import DeviceState
from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import RunningNode, running_node
from support.conditions import until
from support.emulated_kernel import PF, VF
from support.helper_process import Client

ONE_PF = Node(pfs=(Pf(address=PF, device="4940", services="dc", total_vfs=2),))
LEAST = {"bind": 5, "release": 5}
"""Writes of the whole operation: asked, driver_override, unbind, drivers_probe, done."""


class Attacked:
    """A node whose helper's writes are traced."""

    def __init__(self, node: RunningNode) -> None:
        self.node = node
        self.starts = 0
        self.writes = Writes(node.kernel, node.audit_log.parent)

    def start_helper(self) -> None:
        self.starts += 1
        with (self.node.directory / "run/helper.log").open("ab") as log:
            self.node.helper = self.writes.spawn(
                self.node.helper_command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
            )

    async def until_wanted(self) -> None:
        """Wait until the helper serves, both VFs are bound, and the server reports it."""
        await self.node.until("it serves", lambda: self.node.log("helper").count("serving on") == self.starts)
        kernel = self.node.kernel
        await self.node.until("both are bound", lambda: all(vf.driver == "vfio-pci" for vf in self.vfs()))
        await self.node.until_status("the server has seen it", lambda s: s.ready and not any(v.reason for v in s.vfs))
        await self.node.until("nothing is under way", lambda: not self.at_work())
        assert kernel.defects == []

    def at_work(self) -> list[object]:
        """Operations that this helper has begun and not finished."""
        lines = verified(self.node.audit_log)
        started = max(number for number, line in enumerate(lines) if line["event"] == "start")
        return [*interrupted(lines[started:])]

    def without_end(self) -> list[object]:
        """Operations on the VF that have no last line and never will. (The server may have others running.)"""
        lines = interrupted(verified(self.node.audit_log))
        return [line for line in lines if line["arguments"].get("address") == VF]

    def vfs(self) -> list[DeviceState]:
        return [state for state in self.node.kernel.snapshot().values() if state.pf is not None]


@asynccontextmanager
async def attacked() -> AsyncIterator[Attacked]:
    async with running_node(ONE_PF) as node:
        attacked = Attacked(node)
        try:
            attacked.start_helper()
            node.start_server()
            await attacked.until_wanted()
            yield attacked
        finally:
            await node.end()
            attacked.writes.close()


async def bind(on: Attacked) -> None:
    """A VF is bound to its kernel driver, so that the server requests BindDriver."""
    kernel = on.node.kernel
    with kernel.frozen():
        kernel.set_driver_override(VF, None)
        kernel.unbind(VF)
        kernel.probe(VF)


async def release(on: Attacked) -> None:
    """A client releases the VF, and the server requests BindDriver again."""

    def ask() -> None:
        with Client(on.node.helper_socket) as client:
            client.send(ReleaseDriver(id=1, address=PciAddress.parse(VF)))
            client.at_end()  # or a reply

    await asyncio.to_thread(ask)


OPERATIONS: dict[str, Callable[[Attacked], Awaitable[None]]] = {"bind": bind, "release": release}


@pytest.mark.parametrize("all_of_it", [False, True], ids=["the helper alone", "the helper and its children"])
@pytest.mark.parametrize("name", OPERATIONS)
async def test_killed_at_each_write(name: str, all_of_it: bool) -> None:
    async with attacked() as on:
        for at in range(1, LEAST[name] + 1):
            helper = on.node.helper
            assert helper is not None
            known = len(on.without_end())
            killer = Killer(helper, VF, at, all_of_it=all_of_it)
            on.writes.refuse = killer
            await OPERATIONS[name](on)
            await until(killer.struck.is_set)
            await asyncio.to_thread(helper.wait)
            on.node.helper = None
            assert len(on.without_end()) == known + (at > 1), "the log shows it if the request was recorded"
            on.start_helper()
            await on.until_wanted()
        lines = verified(on.node.audit_log)
        assert sum(line["event"] == "start" for line in lines) == LEAST[name] + 1
        assert len(on.without_end()) == LEAST[name] - 1, "every later operation has its last line"
        tried(f"writes at which the helper was killed{' with its children' if all_of_it else ''}", LEAST[name])
