"""Why an operation was not done: one exception for all reasons, which becomes the Failure that the client is sent."""

from typing import Final

from qat_shared.messages import AuditHead, ErrorCode, Failure

UNSIGNED: Final = AuditHead(sequence=0, hash="")
"""Stands in an answer until it is sent: the serving loop puts the audit log's head of that moment there."""
MESSAGE_LIMIT: Final = 500
"""Characters of a Failure's sentence: it may quote what a client sent."""


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


def denied(rule: str, message: str) -> OperationError:
    """The error of a request that a rule of the policy forbids."""
    return OperationError(ErrorCode.DENIED, message, rule=rule)
