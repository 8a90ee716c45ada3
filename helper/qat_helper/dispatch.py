"""From a request to its answer: every request goes through `Dispatcher.ask`, and nothing else starts an operation.

    allowed at all? by the row's rule? no earlier one at work?  ->  audit: asked  ->  a child does it  ->  audit: done

An operation that outlasts its deadline is answered with timed-out, and left alone: what it keeps busy stays so until
its child ends, and only then does the audit log say how it ended.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from qat_helper.allowance import Allowance
from qat_helper.audit import AuditError, AuditLog, Caller, Entry, Fields, printable
from qat_helper.child import Child
from qat_helper.errors import OperationError, denied
from qat_helper.node import Node, Outcome
from qat_helper.operations import OPERATIONS, PF, Operation, deadline_of
from qat_helper.policy import ALL
from qat_shared.messages import AnyReply, AnyRequest, ErrorCode, Failure
from qat_shared.sysfs import MissingError, SysfsError

MAX_WAITING: Final = 128
"""Requests for one operation that wait for a child."""
MAX_IDLE: Final = 8
"""Children of all operations together that wait for more to do: each has a megabyte or two of its own."""
_STRANGERS: Final = -1
"""The uid that all those have in common, in the rate limits, that are not admitted: they may be many."""
_SHOWN: Final = 32
_VF_OF: Final = "vf of"

Answer = Callable[[Outcome], None]
Key = tuple[str, str]
"""What an operation works on: a word of the table's column `alone`, and an address."""


class Job:
    """A request on its way. Its times are of the monotonic clock."""

    def __init__(
        self, caller: Caller, request: AnyRequest, answer: Answer, owner: object, clock: Callable[[], float]
    ) -> None:
        self.caller = caller
        self.owner = owner
        self.request = request
        self.operation: Operation[AnyRequest] = OPERATIONS[type(request)]
        self.kind = (self.operation.name, owner)
        """One child may do all of a kind, one after the other."""
        self.answer = answer
        self._clock = clock
        self.began = clock()
        self.deadline = self.began + deadline_of(request)
        self.asked = 0
        """The sequence number of its line in the audit log."""
        self.timed_out = False
        self.holds: tuple[Key, ...] = ()
        self.excludes: tuple[Key, ...] = ()

    def claim(self, root: Path) -> None:
        """Find out what it must not be done beside, and what must not be done beside it."""
        alone, address = self.operation.alone, str(getattr(self.request, "address", ""))
        if alone == PF:
            self.holds = ((PF, address),)
            self.excludes = ((PF, address), (_VF_OF, address))
        elif alone is not None:
            self.holds = self.excludes = ((alone, address),)
            if alone == "driver" and (pf := _physfn(root, address)):
                self.holds += ((_VF_OF, pf),)
                self.excludes += ((PF, pf),)

    def failed(self, code: ErrorCode, why: str) -> Outcome:
        """The outcome when it was not done, or not to the end."""
        return Outcome(OperationError(code, why).reply(self.request.id))

    def entry(self, event: str, verdict: str = "", reply: AnyReply | None = None) -> Entry:
        """A line about it for the audit log; `reply` once it has ended."""
        return Entry(
            event=event,
            peer=self.caller,
            operation=self.operation.name,
            arguments=_facts(self.request),
            reason=printable(self.request.reason),
            verdict=verdict,
            result={} if reply is None else _facts(reply),
            duration_ms=None if reply is None else round((self._clock() - self.began) * 1000, 3),
            asked=self.asked,
        )


def _physfn(root: Path, address: str) -> str:
    """The address of a VF's PF, "" when there is none, or no such VF. A link's text: reading it waits for nothing."""
    try:
        return os.readlink(f"{root}/bus/pci/devices/{address}/physfn").rpartition("/")[2]
    except OSError:
        return ""


def _facts(message: AnyRequest | AnyReply) -> Fields:
    return {
        name: value
        if value is None or isinstance(value, int)
        else printable(";".join(value) if isinstance(value, tuple) else str(value))
        for name, value in msgspec.structs.asdict(message).items()
        if name not in ("id", "reason", "audit") and value != ""
    }


class Dispatcher:
    """`watch(descriptor, call)` has the serving loop call when the descriptor is readable; `unwatch` ends that."""

    def __init__(
        self,
        node: Node,
        audit: AuditLog,
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._audit = audit
        self._watch = watch
        self._unwatch = unwatch
        self._clock = clock
        self._allowance = Allowance(node.policy.rates, clock)
        self._waiting: list[Job] = []
        self._running: dict[Child, Job] = {}
        self._idle: dict[Child, tuple[str, object]] = {}  # with the kind of job that they did
        self._children: Counter[str] = Counter()  # by operation: all that have not ended
        self._at_work: Counter[Key] = Counter()
        self._counted: Counter[str] = Counter()

    def ask(self, caller: Caller, request: AnyRequest, answer: Answer, owner: object = None) -> None:
        """Have a request done or refused; `answer` is called once, now or later, unless its `owner` is forgotten."""
        job = Job(caller, request, answer, owner, self._clock)
        operation = job.operation
        for limit in (operation.name, ALL) if operation.audited else (operation.name,):
            if not self._allowance.take(caller.uid, limit):
                answer(Outcome(self._too_many(job, limit)))
                return
        try:
            if operation.at_once:
                self._node.policy.check_operation(operation.name)
            operation.rule(self._node.policy, request)
            job.claim(self._node.sysfs_root)
            if any(self._at_work[key] for key in job.excludes):
                raise OperationError(
                    ErrorCode.BUSY, "an earlier operation on this device has not ended: try again later"
                )
            if sum(waiting.operation is operation for waiting in self._waiting) >= MAX_WAITING:
                raise OperationError(ErrorCode.BUSY, f"{MAX_WAITING} requests of this kind wait already")
        except OperationError as error:
            answer(Outcome(self._refused(job, error.reply(request.id))))
            return
        if not operation.at_once:
            answer(perform(self._node, request))
            return
        if operation.audited:
            try:
                job.asked = self._audit.append(job.entry("asked"))
            except AuditError as error:
                answer(job.failed(ErrorCode.AUDIT, str(error)))
                return
        else:
            self._counted[operation.name] += 1
        self._at_work.update(job.holds)
        self._waiting.append(job)
        self._start()

    def turn_away(self, caller: Caller) -> OperationError:
        """A process connected whose uid is not admitted: what to answer to whatever it asks."""
        error = denied("server-uid", f"uid {caller.uid} may not use this helper: see its option --server-uid")
        entry = Entry(event="refused", peer=caller, verdict="denied", result=_facts(error.reply(0)))
        if self._allowance.take(_STRANGERS, ALL):
            with suppress(AuditError):  # it is turned away either way, and the log's trouble has been said
                self._audit.append(entry)
        else:
            self._counted["turned away, not written"] += 1
        return error

    def timeout(self) -> float | None:
        """Seconds until `expire` has something to do, None for never."""
        deadlines = [job.deadline for job in self._unanswered()]
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def expire(self) -> None:
        """Answer what has outlasted its deadline."""
        now = self._clock()
        for job in [job for job in self._unanswered() if job.deadline <= now]:
            why = f"{job.operation.name} did not end in time: it may still come to pass"
            outcome = job.failed(ErrorCode.TIMED_OUT, why)
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, outcome)
            else:
                job.timed_out = True
                job.answer(outcome)

    def forget(self, owner: object) -> None:
        """Whoever asked has gone: what waits is not begun; what was begun goes on, and is audited."""
        for job in [job for job in self._waiting if job.owner is owner]:
            self._waiting.remove(job)
            self._end(job, job.failed(ErrorCode.UNAVAILABLE, "who asked went away before it was begun"))

    def stop(self) -> None:
        """The last line of the audit log. Children still at work are left to end by themselves."""
        unfinished = [*self._waiting, *self._running.values()]
        facts: Fields = dict(self._counted)
        if unfinished:
            shown = unfinished[:_SHOWN]
            facts["unfinished"] = ", ".join(f"{job.operation.name} (asked {job.asked})" for job in shown)
            facts["unfinished_number"] = len(unfinished)
        self._audit.enqueue(Entry(event="stop", arguments=facts))

    def _unanswered(self) -> list[Job]:
        return [job for job in (*self._waiting, *self._running.values()) if not job.timed_out]

    def _refused(self, job: Job, reply: Failure) -> AnyReply:
        """The answer to one that is refused: this failure, when it is in the log, if it belongs there."""
        if not job.operation.audited:  # of a read only that it is denied, and not more often than may be audited
            if reply.code is not ErrorCode.DENIED:
                return reply
            if not self._allowance.take(job.caller.uid, ALL):
                self._counted[f"{job.operation.name} denied, not written"] += 1
                return reply
        try:
            self._audit.append(job.entry("refused", reply.code.value, reply))
        except AuditError as trouble:
            return OperationError(ErrorCode.AUDIT, str(trouble)).reply(job.request.id)
        return reply

    def _too_many(self, job: Job, limit: str) -> AnyReply:
        """Its answer. Only the first of those in a row has a line: many of them must not fill the disk."""
        rate, what = self._node.policy.rates[limit], "audited requests" if limit == ALL else job.operation.name
        error = OperationError(
            ErrorCode.BUSY,
            f"more than {rate.per_second:g} {what} a second, after {rate.burst} at once: ask less often, or raise "
            f"rates.{limit} in the helper's policy file",
            rule=f"rates.{limit}",
        )
        self._counted["refused, too many"] += 1
        reply = error.reply(job.request.id)
        first = self._allowance.first_refusal(job.caller.uid, limit)
        if first and (limit == ALL or self._allowance.take(job.caller.uid, ALL)):
            with suppress(AuditError):  # it is refused either way
                self._audit.append(job.entry("refused", error.code.value, reply))
        return reply

    def _start(self) -> None:
        for job in list(self._waiting):
            if job not in self._waiting:  # its peer is gone, since one before could not be done
                continue
            name = job.operation.name
            child = next((child for child, kind in self._idle.items() if kind == job.kind), None)
            if child is None and self._children[name] >= job.operation.at_once:
                self._dismiss(name)  # another peer's: when they have ended, there is room
                continue
            self._waiting.remove(job)
            try:
                child = child or Child(partial(perform, self._node))
            except OSError as error:
                why = f"no process could be started for it: {os.strerror(error.errno or 0)}"
                self._end(job, job.failed(ErrorCode.INTERNAL, why))
                continue
            if self._idle.pop(child, None) is None:  # new: an idle one is watched already
                self._children[name] += 1
                self._watch(child.channel.fileno(), partial(self._heard, child, name))
            self._running[child] = job
            child.begin(job.request)

    def _heard(self, child: Child, name: str) -> None:
        """It has passed an outcome, or it has ended."""
        job, outcome = self._running.pop(child, None), child.outcome()
        if job is not None:
            why = "the operation's process ended without an answer: see the helper's log"
            self._end(job, outcome or job.failed(ErrorCode.INTERNAL, why))
        if outcome is None:
            self._unwatch(child.channel.fileno())
            child.channel.close()
            self._children[name] -= 1
            self._idle.pop(child, None)
        elif job is not None:
            self._idle[child] = job.kind
        self._start()
        self._dismiss("" if any(other.operation.name == name for other in self._running.values()) else name)

    def _dismiss(self, name: str) -> None:
        """Have the idle children of an operation end, and those that have been idle longest, but for a few."""
        for number, (child, kind) in enumerate(reversed(list(self._idle.items()))):
            if kind[0] == name or number >= MAX_IDLE:
                del self._idle[child]
                child.dismiss()

    def _end(self, job: Job, outcome: Outcome) -> None:
        self._at_work -= Counter(job.holds)
        if job.operation.audited:
            self._audit.enqueue(job.entry(*_ending(job, outcome.reply), outcome.reply))
        elif isinstance(outcome.reply, Failure):
            outcome = Outcome(self._refused(job, outcome.reply))
        if not job.timed_out:
            job.answer(outcome)
        elif outcome.descriptor is not None:
            os.close(outcome.descriptor)


def _ending(job: Job, reply: AnyReply) -> tuple[str, str]:
    """The event and verdict of its last line."""
    if job.timed_out:
        return "late", "late"
    if not isinstance(reply, Failure):
        return "done", "ok"
    return ("refused", "denied") if reply.code is ErrorCode.DENIED else ("done", "failed")


def perform(node: Node, request: AnyRequest) -> Outcome:
    """Do what the request's row says, now. Every foreseen error becomes a Failure."""
    try:
        return OPERATIONS[type(request)].function(node, request)
    except OperationError as error:
        return Outcome(error.reply(request.id))
    except SysfsError as error:
        code = ErrorCode.VANISHED if isinstance(error, MissingError) else ErrorCode.KERNEL
        return Outcome(OperationError(code, f"the device cannot be read: {error}").reply(request.id))
