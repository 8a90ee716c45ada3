"""From a request to its answer: every request goes through `Dispatcher.ask`, and nothing else starts an operation.

    allowed? -> by the row's rule? -> no earlier one at work? -> audit "asked" -> a child does it -> audit "done" -> answer

An operation that outlasts its deadline is answered with timed-out, and left alone: what it keeps busy stays so until its
child ends, and only then does the audit log say how it ended.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct
from qat_shared.messages import AnyReply, AnyRequest, ErrorCode, Failure
from qat_shared.sysfs import MissingError, SysfsError

from qat_helper.audit import AuditError, AuditLog, Entry, printable
from qat_helper.child import Child
from qat_helper.errors import OperationError
from qat_helper.node import Node, Outcome
from qat_helper.operations import OPERATIONS, Operation, deadline_of

MAX_CHILDREN: Final = 32


class Caller(Struct, frozen=True):
    """The process at the other end, as the kernel told when it connected (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


Answer = Callable[[Outcome], None]


class Job:
    """A request on its way. Its times are of the monotonic clock."""

    def __init__(self, caller: Caller, request: AnyRequest, answer: Answer, began: float) -> None:
        self.caller = caller
        self.request = request
        self.operation: Operation[AnyRequest] = OPERATIONS[type(request)]
        self.answer = answer
        self.began = began
        self.deadline = began + deadline_of(request)
        self.asked = 0
        """The sequence number of its line in the audit log."""
        self.timed_out = False

    @property
    def key(self) -> tuple[str, object] | None:
        """What it must be alone with."""
        alone = self.operation.alone
        return None if alone is None else (alone, getattr(self.request, "address", None))

    def entry(self, event: str, reply: AnyReply | None = None) -> Entry:
        """Its line in the audit log, with how it ended once it has."""
        fields = msgspec.structs.asdict(self.request)
        entry = Entry(
            event=event,
            pid=self.caller.pid,
            uid=self.caller.uid,
            gid=self.caller.gid,
            operation=self.operation.name,
            arguments={
                name: value if isinstance(value, int) else printable(str(value))
                for name, value in fields.items()
                if name not in ("id", "reason")
            },
            reason=printable(fields["reason"]),
            asked=self.asked,
        )
        if isinstance(reply, Failure):
            ...
        return entry
