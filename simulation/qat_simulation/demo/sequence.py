"""The demo's order of steps, its end, and what a signal does to it."""

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
from qat_simulation.demo import audit, events, exploring, pods, starting
from qat_simulation.demo.scene import Scene
from qat_simulation.interception.supervisor import InterceptionError
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.kubelet.kubelet import AdmissionError
from qat_simulation.node.description import Node, NodeError, demo_node, parse_node
from qat_simulation.running_node import SimulationError, command, running_node

LIMIT: Final = 27.0
"""Seconds that all steps have together: the demo promises to end in 30."""
_HEALTH_INTERVAL: Final = 0.25  # seconds, so that the heartbeat's failure is soon seen


def run(node: Path | None, policy: AllocationPolicy, keep: bool, console: Console | None = None) -> int:
    """Run the demo; the exit status. `node` is a file with a node description (JSON), None the default node."""
    # On a terminal lines end between words; what reads a pipe wants them whole.
    console = console or Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        for program in ("qat-helper", "qat-plugin"):
            command(program)  # before anything is made
        described = demo_node() if node is None else _read(node)
        return asyncio.run(Demo(console, described, policy, keep).run())
    except OSError as error:
        why = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        console.print(f"[red]demo failed:[/red] {escape(why)}", soft_wrap=True)
        return 1
    except (SimulationError, NodeError, InterceptionError, AdmissionError) as error:
        console.print(f"[red]demo failed:[/red] {escape(str(error))}", soft_wrap=True)
        return 1


class Demo:
    """The steps, in order, on one running node."""

    def __init__(self, console: Console, node: Node, policy: AllocationPolicy, keep: bool) -> None:
        self.console = console
        self.node = node
        self.policy = policy
        self.keep = keep
        self._exploring = False

    async def run(self) -> int:
        """All steps; the exit status. A signal ends it as cleanly as the last step does."""
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
            if not self._exploring:
                return 128 + received[0]
            self.console.print("removed")
            return 0

    async def _run(self) -> int:
        began = time.monotonic()
        async with self._scene() as scene:
            try:
                async with asyncio.timeout(LIMIT):
                    await self._steps(scene)
            except TimeoutError:
                raise SimulationError(f"the {LIMIT:g} s for all steps were over at: {scene.now}") from None
            passed = _last_words(scene, time.monotonic() - began)
            if self.keep:
                self._exploring = True
                await exploring.explore(scene)
            elif passed:
                program = command("qat-plugin")[0]
                self.console.print(f"To look around in such a node: {program} demo --keep", soft_wrap=True)
        return 0 if passed else 1

    @asynccontextmanager
    async def _scene(self) -> AsyncIterator[Scene]:
        options = [f"--health-interval={_HEALTH_INTERVAL}s", f"--kernel-vf-drivers={_vf_drivers(self.node)}"]
        if self.policy is not AllocationPolicy.NONE:
            options.append(f"--allocation-policy={self.policy}")
        async with running_node(self.node, options) as node:
            config = ConfigMap(node.directory / "config")
            config.write({"qat.conf": "# all VFs are wanted; about services nothing is said yet\n"})
            node.add_server_options(f"--provisioning-config={config.directory}")
            yield Scene(self.console, self.node, node, config, self.policy)

    async def _steps(self, scene: Scene) -> None:
        starting.show_node(scene)
        await starting.start(scene)
        await starting.provision(scene)
        await starting.bind(scene)
        await starting.register(scene)
        await pods.allocate(scene)
        await events.heartbeat(scene)
        await events.restart_kubelet(scene)
        await events.kill_helper(scene)
        await events.change_services(scene)
        audit.show_audit(scene)


def _last_words(scene: Scene, seconds: float) -> bool:
    """Say how it went: whether all that should be seen was."""
    more = f"; {scene.skipped} that this node does not allow were left out" if scene.skipped else ""
    if not scene.troubles:
        scene.console.print(
            f"\n[bold green]All {scene.seen} steps were seen to happen[/bold green] in {seconds:.1f} s{more}."
        )
        return True
    scene.console.print(f"\n{scene.seen} steps were seen to happen in {seconds:.1f} s{more}.")
    for trouble in scene.troubles:
        scene.console.print(f"[red]demo failed:[/red] {trouble}")
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
