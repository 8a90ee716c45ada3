"""An operation's inputs (Node) and result (Outcome; errors are OperationErrors: errors.py)."""

from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from qat_helper.policy import Policy
from qat_shared.messages import AnyReply


class Node(Struct, frozen=True):
    """The helper's own options: the only source of paths, and of the group that receives access."""

    sysfs_root: Path
    kubelet_dir: Path
    server_gid: int
    policy: Policy
    sandbox: dict[str, str] = {}
    """By layer: why it is missing, "" when it is in place (confinement.py)."""


class Outcome(NamedTuple):
    """A reply and the descriptor to send with it, which the receiver of the Outcome must close."""

    reply: AnyReply
    descriptor: int | None = None
