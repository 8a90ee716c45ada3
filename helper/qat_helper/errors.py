"""The one exception for an operation that was not done; the client receives it as a Failure."""

from typing import Final

from qat_shared.messages import AuditHead, ErrorCode, Failure

PENDING_HEAD: Final = AuditHead(sequence=0, hash="")
"""Placeholder in a reply: the serving loop replaces it with the audit log's head when it sends the reply."""
MESSAGE_LIMIT: Final = 500
"""Characters in a Failure's message, which may quote what a client sent."""


class OperationError(Exception):
    """An operation was not done. The attributes are the fields of a Failure."""

    def __init__(self, code: ErrorCode, message: str, errno: int = 0, rule: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.errno = errno
        self.rule = rule

    def reply(self, request_id: int) -> Failure:
        """The Failure to send."""
        return Failure(
            id=request_id,
            audit=PENDING_HEAD,
            code=self.code,
            message=self.message[:MESSAGE_LIMIT],
            errno=self.errno,
            rule=self.rule,
        )


def denied(rule: str, message: str) -> OperationError:
    """An error for a request that a policy rule forbids."""
    return OperationError(ErrorCode.DENIED, message, rule=rule)
