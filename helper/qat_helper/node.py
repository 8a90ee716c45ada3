"""What an operation is given (Node), and what it gives back (Outcome, or an OperationError: errors.py)."""

from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from qat_helper.policy import Policy
from qat_shared.messages import AnyReply


class Node(Struct, frozen=True):
    """The helper's own options: the only source of paths and of the group that things are given to."""

    sysfs_root: Path
    kubelet_dir: Path
    server_gid: int
    policy: Policy
    sandbox: dict[str, str] = {}
    """By layer, what is missing of it (confinement.py)."""


class Outcome(NamedTuple):
    """An operation's answer, and the descriptor that goes with it (the receiver's to close)."""

    reply: AnyReply
    descriptor: int | None = None
