"""`qat-plugin demo`: the main job, shown on a simulated node by the real helper and server.

Each step does something to the node, waits until it is *seen* to have the effect that it should (never for a time), and
prints what was seen. What a node does not allow to be shown is said, not claimed. The exit status is 0 only when every
step was seen and no VF that should have been bound was not.
"""

import asyncio
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from qat_server.kubelet.allocation import AllocationPolicy
from qat_simulation.demo.sequence import Demo
from qat_simulation.interception.supervisor import InterceptionError
from qat_simulation.kubelet.kubelet import AdmissionError
from qat_simulation.node.description import Node, NodeError, demo_node, parse_node
from qat_simulation.running_node import SimulationError, command

__all__ = ["run"]


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


def _read(path: Path) -> Node:
    """Raises NodeError that names the file, and OSError."""
    try:
        return parse_node(path.read_bytes())
    except NodeError as error:
        raise NodeError(f"{path}: {error}") from None
