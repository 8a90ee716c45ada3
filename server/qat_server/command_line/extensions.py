"""Extensions of the command line by other distributions, found by entry points: commands, and simulated nodes.

qat-plugin-simulation adds both. The server neither needs nor imports it: only commands search for entry points.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from qat_server.command_line.flags import FlagError

COMMANDS: Final = "qat_plugin.commands"
"""The entry point group of commands: functions whose parameters have typer's annotations."""

NODE_DESCRIPTIONS: Final = "qat_plugin.node_descriptions"
"""The entry point group of functions that create the sysfs tree of a described node (`described_node`)."""

_SIMULATION: Final = (
    "needs the distribution qat-plugin-simulation, which is not installed here:"
    " in a checkout, make venv installs it into .venv"
)


def commands() -> dict[str, Callable[..., None]]:
    """The installed commands by name."""
    return {each.name: each.load() for each in entry_points(group=COMMANDS)}


def check_installed(name: str) -> None:
    """Raise FlagError for a known command whose distribution is not installed."""
    if name == "demo":
        raise FlagError(f"demo {_SIMULATION}")


def described_node(path: Path) -> AbstractContextManager[Path]:
    """A context manager for the sysfs root of the node that a file describes.

    Raises OSError if the file cannot be read, ValueError if the description is invalid, and FlagError if no installed
    distribution creates such nodes.
    """
    for each in entry_points(group=NODE_DESCRIPTIONS):
        node: AbstractContextManager[Path] = each.load()(path)
        return node
    raise FlagError(f"--node {_SIMULATION}")
