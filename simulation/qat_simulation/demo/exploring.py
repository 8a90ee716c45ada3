"""`demo --keep`: the node goes on until interrupted, processes that end are started again, and one can meddle with it.

A FIFO in the node's directory takes commands (control.py), one a line: a shell's writes into the tree change files and
nothing else, since only what the node's own processes write comes to the emulated kernel. The answers are printed here.
"""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable
from typing import Final

from qat_simulation.demo.control import Control, ControlError
from qat_simulation.demo.scene import Scene
from qat_simulation.running_node import SimulationError, command

RESTART_AFTER: Final = 2.0
"""Seconds until a process that has ended is started again, as the kubelet or systemd would."""
_LINE_LIMIT: Final = 4096


async def explore(scene: Scene) -> None:
    """Until cancelled."""
    node = scene.node
    path = node.directory / "control"
    os.mkfifo(path, 0o600)
    # Open for writing too: without a writer a FIFO would be at its end for ever.
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _say_how(scene, str(path))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_obey(scene, descriptor))
            tasks.create_task(_keep_up(scene, "helper"))
            tasks.create_task(_keep_up(scene, "server"))
    finally:
        os.close(descriptor)


def _say_how(scene: Scene, control: str) -> None:
    node, program = scene.node, command("qat-plugin")[0]
    pf = next((pf.address for pf in scene.description.pfs), None)
    vf = next((str(address) for address, state in node.kernel.snapshot().items() if state.pf), None)
    meddle = (
        [f"heartbeat {pf} -1"] * bool(pf) + [f"unplug {vf}"] * bool(vf) + ["kubelet restart", "kill helper", "help"]
    )
    lines = (
        f"\nThe node goes on in {node.directory} until you press Ctrl-C. To look at it:",
        f"  {program} status --kubelet-dir {node.kubelet_directory}",
        f"  curl -s http://127.0.0.1:{node.metrics_port}/metrics",
        f"  tail -f {node.audit_log}",
        f"  tail -f {node.directory}/run/server.log",
        f"  ls -l {node.kernel.sysfs_root}/bus/pci/devices/",
        "To make something happen, from another terminal (the answer comes here):",
        *(f"  echo {each} > {control}" for each in meddle),
    )
    for line in lines:
        scene.console.print(line, soft_wrap=True, markup=False)


async def _obey(scene: Scene, descriptor: int) -> None:
    control = Control(scene)
    loop = asyncio.get_running_loop()
    rest = b""
    while True:
        readable = loop.create_future()
        loop.add_reader(descriptor, _set, readable)
        try:
            await readable
        finally:
            loop.remove_reader(descriptor)
        *lines, rest = (rest + os.read(descriptor, _LINE_LIMIT)).split(b"\n")
        rest = rest[-_LINE_LIMIT:]
        for line in filter(bytes.strip, lines):
            try:
                said = await control.do(line.decode(errors="replace").strip())
            except ControlError as error:
                said = str(error)
            scene.console.print(f"> {said}", soft_wrap=True, markup=False)


def _set(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _keep_up(scene: Scene, name: str) -> None:
    node = scene.node
    start: Callable[[], None] = node.start_helper if name == "helper" else node.start_server
    while True:
        process: subprocess.Popen[bytes] | None = node.helper if name == "helper" else node.server
        if process is not None and process.poll() is None:
            await asyncio.sleep(0.1)
            continue
        how = f"ended with status {process.returncode}" if process is not None else "is not there"
        scene.console.print(f"> the {name} {how}: it is started again in {RESTART_AFTER:g} s", markup=False)
        await asyncio.sleep(RESTART_AFTER)
        start()
        process = node.helper if name == "helper" else node.server
        assert process is not None  # noqa: S101
        where = ""
        if name == "server":
            with contextlib.suppress(SimulationError):  # something has ended again already, as will be said
                port = await node.until("it listens", lambda: node.metrics_port)
                where = f", at http://127.0.0.1:{port}/metrics now"
        scene.console.print(f"> the {name} runs again, pid {process.pid}{where}", markup=False)
