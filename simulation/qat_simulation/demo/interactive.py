"""`demo --keep`: the node runs until interrupted, processes that end are restarted, and commands can change the node.

A FIFO in the node's directory takes commands (control.py), one on each line; results are printed. It is needed because
a shell's write into the tree only changes a file: the emulated kernel sees only the node's own processes' writes.
"""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable
from typing import Final

from qat_simulation.demo.control import Control, ControlError
from qat_simulation.demo.demo_run import DemoRun
from qat_simulation.running_node import SimulationError, command

RESTART_AFTER: Final = 2.0
"""Seconds until a process that has ended is restarted, as the kubelet or systemd would do."""
_LINE_LIMIT: Final = 4096


async def run_until_cancelled(demo: DemoRun) -> None:
    """Print instructions, take commands, and restart processes, until cancelled."""
    node = demo.node
    path = node.directory / "control"
    os.mkfifo(path, 0o600)
    # Open for writing too: without a writer, reading a FIFO returns end-of-file at once.
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _print_instructions(demo, str(path))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_run_commands(demo, descriptor))
            tasks.create_task(_restart_on_exit(demo, "helper"))
            tasks.create_task(_restart_on_exit(demo, "server"))
    finally:
        os.close(descriptor)


def _print_instructions(demo: DemoRun, control: str) -> None:
    node, program = demo.node, command("qat-plugin")[0]
    pf = next((pf.address for pf in demo.description.pfs), None)
    vf = next((str(address) for address, state in node.kernel.snapshot().items() if state.pf), None)
    examples = (
        [f"heartbeat {pf} -1"] * bool(pf) + [f"unplug {vf}"] * bool(vf) + ["kubelet restart", "kill helper", "help"]
    )
    lines = (
        f"\nThe node keeps running in {node.directory} until you press Ctrl-C. To inspect it:",
        f"  {program} status --kubelet-dir {node.kubelet_directory}",
        f"  curl -s http://127.0.0.1:{node.metrics_port}/metrics",
        f"  tail -f {node.audit_log}",
        f"  tail -f {node.directory}/run/server.log",
        f"  ls -l {node.kernel.sysfs_root}/bus/pci/devices/",
        "To change it, from another terminal (results are printed here):",
        *(f"  echo {each} > {control}" for each in examples),
    )
    for line in lines:
        demo.console.print(line, soft_wrap=True, markup=False)


async def _run_commands(demo: DemoRun, descriptor: int) -> None:
    control = Control(demo)
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
                result = await control.run(line.decode(errors="replace").strip())
            except ControlError as error:
                result = str(error)
            demo.console.print(f"> {result}", soft_wrap=True, markup=False)


def _set(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _restart_on_exit(demo: DemoRun, name: str) -> None:
    node = demo.node
    start: Callable[[], None] = node.start_helper if name == "helper" else node.start_server
    while True:
        process: subprocess.Popen[bytes] | None = node.helper if name == "helper" else node.server
        if process is not None and process.poll() is None:
            await asyncio.sleep(0.1)
            continue
        how = f"ended with status {process.returncode}" if process is not None else "is not running"
        demo.console.print(f"> the {name} {how}: restarting it in {RESTART_AFTER:g} s", markup=False)
        await asyncio.sleep(RESTART_AFTER)
        start()
        process = node.helper if name == "helper" else node.server
        assert process is not None  # noqa: S101
        where = ""
        if name == "server":
            with contextlib.suppress(SimulationError):  # a process has ended again, which is reported next
                port = await node.until("it listens", lambda: node.metrics_port)
                where = f", at http://127.0.0.1:{port}/metrics now"
        demo.console.print(f"> the {name} runs again, pid {process.pid}{where}", markup=False)
