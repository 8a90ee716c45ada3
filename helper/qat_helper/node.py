"""What an operation is given (Node), and what it gives back (Outcome, or an OperationError)."""

from pathlib import Path
from typing import Final, NamedTuple

from msgspec import Struct
from qat_shared.messages import AnyReply, AuditHead, ErrorCode, Failure

from qat_helper.policy import Policy

UNSIGNED: Final = AuditHead(sequence=0, hash="")
"""Stands in a reply until it is sent: the serving loop puts the log's head of that moment there."""
MESSAGE_LIMIT: Final = 500
"""Characters of a Failure's sentence: it may quote what a client sent."""


class Node(Struct, frozen=True):
    """The helper's own options: the only source of paths and of the group that things are given to."""

    sysfs_root: Path
    kubelet_dir: Path
    server_gid: int
    policy: Policy


class Outcome(NamedTuple):
    """An operation's answer, and the descriptor that goes with it (the receiver's to close)."""

    reply: AnyReply
    descriptor: int | None = None


class OperationError(Exception):
    """An operation was not done: the facts of a Failure."""

    def __init__(self, code: ErrorCode, message: str, errno: int = 0, rule: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.errno = errno
        self.rule = rule

    def reply(self, request_id: int) -> Failure:
        """The answer that tells it."""
        return Failure(
            id=request_id,
            audit=UNSIGNED,
            code=self.code,
            message=self.message[:MESSAGE_LIMIT],
            errno=self.errno,
            rule=self.rule,
        )
