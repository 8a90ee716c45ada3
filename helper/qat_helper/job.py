"""One request in progress: which devices it keeps busy, when it is late, and its lines in the audit log."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from qat_helper.audit.log import Caller, Entry, Fields, printable
from qat_helper.errors import OperationError
from qat_helper.operations.node import Outcome
from qat_helper.operations.table import OPERATIONS, PF, Operation, deadline_of
from qat_shared.messages import AnyReply, AnyRequest, ErrorCode, Failure

_VF_OF: Final = "vf of"
"""The first part of the key of a PF on whose VFs a job works."""

ReplyTo = Callable[[Outcome], None]
Key = tuple[str, str]
"""What an operation works on: a word of the table's column `exclusive`, and an address."""


class Job:
    """A request in progress. Times are of the monotonic clock."""

    def __init__(
        self, caller: Caller, request: AnyRequest, reply_to: ReplyTo, owner: object, clock: Callable[[], float]
    ) -> None:
        self.caller = caller
        self.owner = owner
        self.request = request
        self.operation: Operation[AnyRequest] = OPERATIONS[type(request)]
        self.kind = (self.operation.name, owner)
        """One child can perform all jobs of a kind, one after another."""
        self.reply_to = reply_to
        self._clock = clock
        self.started_at = clock()
        self.deadline = self.started_at + deadline_of(request)
        self.asked = 0
        """The sequence number of its first audit line."""
        self.timed_out = False
        self.holds: tuple[Key, ...] = ()
        self.excludes: tuple[Key, ...] = ()

    def claim(self, root: Path) -> None:
        """Set the keys that this job holds until it ends, and those that no unfinished job may hold."""
        exclusive, address = self.operation.exclusive, str(getattr(self.request, "address", ""))
        if exclusive == PF:
            self.holds = ((PF, address),)
            self.excludes = ((PF, address), (_VF_OF, address))
        elif exclusive is not None:
            self.holds = self.excludes = ((exclusive, address),)
            if exclusive == "driver" and (pf := _physfn(root, address)):
                self.holds += ((_VF_OF, pf),)
                self.excludes += ((PF, pf),)

    def failed(self, code: ErrorCode, why: str) -> Outcome:
        """The outcome of a job that was not done or not finished."""
        return Outcome(OperationError(code, why).reply(self.request.id))

    def entry(self, event: str, verdict: str = "", reply: AnyReply | None = None) -> Entry:
        """An audit line about this job; `reply` once it has ended."""
        return Entry(
            event=event,
            peer=self.caller,
            operation=self.operation.name,
            arguments=fields_of(self.request),
            reason=printable(self.request.reason),
            verdict=verdict,
            result={} if reply is None else fields_of(reply),
            duration_ms=None if reply is None else round((self._clock() - self.started_at) * 1000, 3),
            asked=self.asked,
        )

    def last_entry(self, reply: AnyReply) -> Entry:
        """The audit line about its end."""
        if self.timed_out:
            return self.entry("late", "late", reply)
        if not isinstance(reply, Failure):
            return self.entry("done", "ok", reply)
        event, verdict = ("refused", "denied") if reply.code is ErrorCode.DENIED else ("done", "failed")
        return self.entry(event, verdict, reply)


def _physfn(root: Path, address: str) -> str:
    """The address of a VF's PF, "" if there is none. Reading a link's target never blocks."""
    try:
        return os.readlink(f"{root}/bus/pci/devices/{address}/physfn").rpartition("/")[2]
    except OSError:
        return ""


def fields_of(message: AnyRequest | AnyReply) -> Fields:
    """A message's fields as an audit line has them: numbers, and printable texts; without those that are empty."""
    return {
        name: value
        if value is None or isinstance(value, int)
        else printable(";".join(value) if isinstance(value, tuple) else str(value))
        for name, value in msgspec.structs.asdict(message).items()
        if name not in ("id", "reason", "audit", "answer") and value != ""
    }
