"""The simulation's entry points for qat-plugin: the command `demo`, and the sysfs tree of a described node.

Every qat-plugin command loads this module, so it imports the rest of the simulation only in the functions.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qat_server.command_line.settings import SettingsError, allocation_policy

if TYPE_CHECKING:
    from qat_simulation.node.description import Node


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="leave the node running until interrupted")] = False,
    node: Annotated[
        str | None, typer.Option("--node", metavar="FILE", help="simulate the node described in FILE (JSON)")
    ] = None,
    policy: Annotated[str, typer.Option("--policy", metavar="POLICY", help="balanced or packed")] = "balanced",
) -> None:
    """Run the real helper and server on a simulated node and show each step. Needs no hardware and no root."""
    try:
        chosen = allocation_policy(policy)
    except ValueError as error:
        raise SettingsError(f"--policy: {error}") from None
    if node is not None and not Path(node).exists():
        raise SettingsError(f"--node: there is no file {node[:200]!r}")
    if node is not None and Path(node).is_dir():
        raise SettingsError(f"--node: {node[:200]!r} is a directory; a file with a node description is needed")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # as in qat_server/main.py
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # the demo starts processes, none of which inherits gRPC
    from qat_simulation.demo import sequence  # noqa: PLC0415 - gRPC, which no other command needs

    raise typer.Exit(sequence.run(Path(node) if node else None, chosen, keep))


def described_node(path: Path) -> AbstractContextManager[Path]:
    """The sysfs root of a described node, to be entered. Raises OSError, and NodeError (a ValueError)."""
    from qat_simulation.node.description import parse_node  # noqa: PLC0415 - only `config check --node` needs it

    return _sysfs(parse_node(path.read_bytes()))


@contextmanager
def _sysfs(node: "Node") -> Iterator[Path]:
    from qat_simulation.kernel.kernel import Kernel  # noqa: PLC0415 - as above

    with tempfile.TemporaryDirectory(prefix="qat-") as directory, Kernel(Path(directory), node) as kernel:
        yield kernel.sysfs_root
