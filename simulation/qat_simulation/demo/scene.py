"""What every step of the demo is given: the running node, the screen, and the account of what was seen and what not."""

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


class Step:
    """A step under way: `title` is what will have been seen when it ends."""

    def __init__(self, title: str) -> None:
        self.title = title


class Scene:
    """One running demo. `troubles` are what should have come to pass and did not; `pods` what each pod was given."""

    def __init__(
        self, console: Console, description: Node, node: RunningNode, config: ConfigMap, policy: AllocationPolicy
    ) -> None:
        self.console = console
        self.description = description
        self.node = node
        self.config = config
        self.policy = policy
        self.pods: dict[str, Allocation] = {}
        self.bare: frozenset[str] = frozenset()
        """PFs that had no VFs before anything was started, and on which the plugin enables them."""
        self.seen = 0
        self.skipped = 0
        self.troubles: list[str] = []
        self.now = ""
        """The title of the step under way, or of the last one."""

    @asynccontextmanager
    async def step(self, title: str) -> AsyncIterator[Step]:
        """Counts, and prints, when the block ends without an error."""
        began = time.monotonic()
        step, self.now = Step(title), title
        with self.console.status(f"{escape(title)} ..."):
            yield step
        self.saw(f"{step.title}", f"({(time.monotonic() - began) * 1000:.0f} ms)")

    def saw(self, what: str, how_long: str = "") -> None:
        """A step that was seen."""
        self.seen += 1
        self.now = what
        self.console.print(f"\n[green]✓[/green] [bold]{escape(what)}[/bold] [dim]{how_long}[/dim]".rstrip())

    def skip(self, why: str) -> None:
        """A step that this node does not allow."""
        self.skipped += 1
        self.console.print(f"\n[dim]- {escape(why)}[/dim]")

    def trouble(self, what: str, why: Iterable[str] = ()) -> None:
        """Something that should have come to pass and did not: the exit status will not be 0."""
        self.troubles.append(what)
        self.console.print(f"\n[red]✗[/red] [bold]{escape(what)}[/bold]")
        for reason in why:
            self.say(reason)

    def say(self, text: str) -> None:
        """A line of detail, as it is."""
        indented = f"  {text}" if self.console.soft_wrap else Padding(Text(text), (0, 0, 0, 2))
        self.console.print(indented, markup=False)

    def show_capacity(self) -> None:
        """As `kubectl describe node` prints it."""
        kubelet = self.node.kubelet
        for title, quantities in (("Capacity", kubelet.capacity()), ("Allocatable", kubelet.allocatable())):
            self.console.print(f"  {title}:")
            for resource, quantity in sorted(quantities.items()):
                self.console.print(f"    {resource + ':':<28} {quantity}")

    def show_allocation(self, allocation: Allocation) -> None:
        """What a container is started with."""
        for key, value in allocation.envs.items():
            self.console.print(f"    {key}={value}")
        self.console.print(f"    devices: {', '.join(allocation.device_nodes)}")
        if allocation.mounts:
            self.console.print(f"    mounts: {', '.join(allocation.mounts)}")
