"""The demo from its start to its exit status: the order of the steps, their time limit, signals and errors."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape

from qat_server.kubelet.allocation import AllocationPolicy
from qat_shared.devices import VIRTUAL
from qat_simulation.demo import audit, events, interactive, startup
from qat_simulation.demo.demo_run import DemoRun
from qat_simulation.interception.supervisor import InterceptionError
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.kubelet.kubelet import AdmissionError
from qat_simulation.node.description import Node, NodeError, demo_node, parse_node
from qat_simulation.running_node import SimulationError, command, running_node

LIMIT: Final = 27.0
"""Seconds for all steps together: the demo promises to end in 30."""
_HEALTH_INTERVAL: Final = 0.25  # seconds: short, so that the server soon detects the lost heartbeat


def run(node: Path | None, policy: AllocationPolicy, keep: bool, console: Console | None = None) -> int:
    """Run the demo and return the exit status. `node` is a file with a node description (JSON), or None."""
    # A terminal gets lines that are wrapped between words, a pipe or file whole lines.
    console = console or Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        for program in ("qat-helper", "qat-plugin"):
            command(program)  # fails before anything is made
        described = demo_node() if node is None else _read(node)
        return asyncio.run(Sequence(console, described, policy, keep).run())
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        console.print(f"[red]demo failed:[/red] {escape(reason)}", soft_wrap=True)
        return 1
    except (SimulationError, NodeError, InterceptionError, AdmissionError) as error:
        console.print(f"[red]demo failed:[/red] {escape(str(error))}", soft_wrap=True)
        return 1


class Sequence:
    """The steps, in order, on one running node."""

    def __init__(self, console: Console, node: Node, policy: AllocationPolicy, keep: bool) -> None:
        self.console = console
        self.node = node
        self.policy = policy
        self.keep = keep
        self._interactive = False

    async def run(self) -> int:
        """Run all steps and return the exit status. A signal ends the demo as cleanly as the last step does."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        received: list[int] = []

        def end(number: int) -> None:
            received.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, end, number)
        try:
            return await self._run()
        except asyncio.CancelledError:
            if not received:
                raise
            if not self._interactive:
                return 128 + received[0]
            self.console.print("removed")
            return 0

    async def _run(self) -> int:
        began = time.monotonic()
        async with self._running() as demo:
            try:
                async with asyncio.timeout(LIMIT):
                    await self._steps(demo)
            except TimeoutError:
                raise SimulationError(
                    f"the steps did not finish within {LIMIT:g} s; the last one was: {demo.current}"
                ) from None
            passed = _print_summary(demo, time.monotonic() - began)
            if self.keep:
                self._interactive = True
                await interactive.run_until_cancelled(demo)
            elif passed:
                program = command("qat-plugin")[0]
                self.console.print(f"To inspect such a node: {program} demo --keep", soft_wrap=True)
        return 0 if passed else 1

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[DemoRun]:
        options = [f"--health-interval={_HEALTH_INTERVAL}s", f"--kernel-vf-drivers={_vf_drivers(self.node)}"]
        if self.policy is not AllocationPolicy.NONE:
            options.append(f"--allocation-policy={self.policy}")
        async with running_node(self.node, options) as node:
            config = ConfigMap(node.directory / "config")
            config.write({"qat.conf": "# enables all VFs; services are not configured yet\n"})
            node.add_server_options(f"--provisioning-config={config.directory}")
            yield DemoRun(self.console, self.node, node, config, self.policy)

    async def _steps(self, demo: DemoRun) -> None:
        startup.show_node(demo)
        await startup.start(demo)
        await startup.provision(demo)
        await startup.bind(demo)
        await startup.register(demo)
        await events.allocate(demo)
        await events.heartbeat(demo)
        await events.restart_kubelet(demo)
        await events.kill_helper(demo)
        await events.change_services(demo)
        audit.show_audit(demo)


def _print_summary(demo: DemoRun, seconds: float) -> bool:
    """Print the results; whether no step failed."""
    skipped = f"; {demo.skipped} skipped, since this node does not allow them" if demo.skipped else ""
    if not demo.failures:
        demo.console.print(
            f"\n[bold green]All {demo.succeeded} steps succeeded[/bold green] in {seconds:.1f} s{skipped}."
        )
        return True
    demo.console.print(f"\n{demo.succeeded} steps succeeded in {seconds:.1f} s{skipped}.")
    for failure in demo.failures:
        demo.console.print(f"[red]demo failed:[/red] {failure}")
    return False


def _vf_drivers(node: Node) -> str:
    ids = {pf.vf_device_id for pf in node.pfs} | {int(vf.device, 16) for vf in node.vfs}
    return ",".join(sorted({VIRTUAL[number].driver for number in ids})) or "4xxxvf"


def _read(path: Path) -> Node:
    """Raises NodeError that names the file, and OSError."""
    try:
        return parse_node(path.read_bytes())
    except NodeError as error:
        raise NodeError(f"{path}: {error}") from None
