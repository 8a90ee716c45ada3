"""The state that all steps of one demo share: the running node, the console, and the steps' results."""

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from qat_server.kubelet.allocation import AllocationPolicy
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.kubelet.kubelet import Allocation
from qat_simulation.node.description import Node
from qat_simulation.running_node import RunningNode


class DemoRun:
    """One run of the demo. `pods` has each pod's allocation, `failures` one sentence for each failed step."""

    def __init__(
        self, console: Console, description: Node, node: RunningNode, config: ConfigMap, policy: AllocationPolicy
    ) -> None:
        self.console = console
        self.description = description
        self.node = node
        self.config = config
        self.policy = policy
        self.pods: dict[str, Allocation] = {}
        self.pfs_without_vfs: frozenset[str] = frozenset()
        """PFs that have no VFs before the processes start, and on which the plugin enables them."""
        self.succeeded = 0
        self.skipped = 0
        self.failures: list[str] = []
        self.current = ""
        """The title of the present step, or of the last one."""

    @asynccontextmanager
    async def step(self, title: str) -> AsyncIterator[None]:
        """One step: it is counted and printed when the block ends without an error."""
        began = time.monotonic()
        self.current = title
        with self.console.status(f"{escape(title)} ..."):
            yield
        self.success(title, time.monotonic() - began)

    def success(self, title: str, seconds: float | None = None) -> None:
        """Count and print a step that succeeded."""
        self.succeeded += 1
        self.current = title
        duration = "" if seconds is None else f"({seconds * 1000:.0f} ms)"
        self.console.print(f"\n[green]✓[/green] [bold]{escape(title)}[/bold] [dim]{duration}[/dim]".rstrip())

    def skip(self, reason: str) -> None:
        """Count and print a step that this node does not allow."""
        self.skipped += 1
        self.console.print(f"\n[dim]- {escape(reason)}[/dim]")

    def failure(self, title: str, reasons: Iterable[str] = ()) -> None:
        """Record and print a step that failed: the exit status will not be 0."""
        self.failures.append(title)
        self.console.print(f"\n[red]✗[/red] [bold]{escape(title)}[/bold]")
        for reason in reasons:
            self.detail(reason)

    def detail(self, text: str) -> None:
        """Print an indented line."""
        indented = f"  {text}" if self.console.soft_wrap else Padding(Text(text), (0, 0, 0, 2))
        self.console.print(indented, markup=False)

    def show_capacity(self) -> None:
        """Print capacity and allocatable, as `kubectl describe node` does."""
        kubelet = self.node.kubelet
        for title, quantities in (("Capacity", kubelet.capacity()), ("Allocatable", kubelet.allocatable())):
            self.console.print(f"  {title}:")
            for resource, quantity in sorted(quantities.items()):
                self.console.print(f"    {resource + ':':<28} {quantity}")

    def show_allocation(self, allocation: Allocation) -> None:
        """Print the settings that a pod's container is started with."""
        for key, value in allocation.envs.items():
            self.console.print(f"    {key}={value}")
        self.console.print(f"    devices: {', '.join(allocation.device_nodes)}")
        if allocation.mounts:
            self.console.print(f"    mounts: {', '.join(allocation.mounts)}")
