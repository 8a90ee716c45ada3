"""What other distributions add to the command line, found by entry points: commands, and nodes that are not real.

qat-plugin-simulation adds both. The server neither needs nor imports it: only a command looks for entry points.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from qat_server.command_line.flags import FlagError

COMMANDS: Final = "qat_plugin.commands"
"""The group of the commands: each is a function whose parameters have typer's annotations."""

NODE_DESCRIPTIONS: Final = "qat_plugin.node_descriptions"
"""The group of the functions that make a sysfs tree of the node that a file describes (`described_node`)."""

_SIMULATION: Final = (
    "needs the distribution qat-plugin-simulation, which is not installed here:"
    " in a checkout, make venv installs it into .venv"
)


def commands() -> dict[str, Callable[..., None]]:
    """The installed commands by name."""
    return {each.name: each.load() for each in entry_points(group=COMMANDS)}


def check_installed(name: str) -> None:
    """Raise FlagError for a command that is known but whose distribution is not installed."""
    if name == "demo":
        raise FlagError(f"demo {_SIMULATION}")


def described_node(path: Path) -> AbstractContextManager[Path]:
    """The sysfs root of the node that a file describes, to be entered.

    Raises OSError for a file that cannot be read, ValueError for a wrong description, and FlagError where no installed
    distribution makes such nodes.
    """
    for each in entry_points(group=NODE_DESCRIPTIONS):
        node: AbstractContextManager[Path] = each.load()(path)
        return node
    raise FlagError(f"--node {_SIMULATION}")
