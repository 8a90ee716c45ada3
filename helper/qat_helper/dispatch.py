"""From a request to its reply: every request goes through `Dispatcher.submit`; nothing else starts an operation.

    operation allowed? row's rule? device not busy?  ->  audit: asked  ->  a child performs it  ->  audit: done

An operation that outlasts its deadline gets a timed-out reply and keeps running. Its device stays busy until its child
ends, and only then does the audit log record the result.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from qat_helper.audit.log import AuditError, AuditLog, Caller, Entry, Fields
from qat_helper.child import Child
from qat_helper.errors import OperationError, denied
from qat_helper.job import Job, Key, ReplyTo, fields_of
from qat_helper.operations.node import Node, Outcome
from qat_helper.operations.table import MAX_CHILDREN, OPERATIONS, Operation
from qat_helper.policy import ALL
from qat_helper.rate_limit import RateLimiter
from qat_shared.messages import AnyReply, AnyRequest, ErrorCode, Failure
from qat_shared.sysfs import MissingError, SysfsError

MAX_QUEUED: Final = 128
"""Queued requests per operation."""
MAX_IDLE: Final = 8
"""Idle children of all operations together."""
_REJECTED_UIDS: Final = -1
"""The uid under which all rejected uids share one rate limit: there may be many of them."""
_LISTED: Final = 32


class Dispatcher:
    """Queues requests, runs them in children and audits them.

    `watch(descriptor, call)` makes the serving loop call `call` when the descriptor is readable; `unwatch` ends that.
    """

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
        self._rate_limiter = RateLimiter(node.policy.rates, clock)
        self._queue: list[Job] = []
        self._running: dict[Child, Job] = {}
        self._idle: dict[Child, tuple[str, object]] = {}  # the kind of job that each did last
        self._children: Counter[str] = Counter()  # by operation: all that have not exited
        self._busy: Counter[Key] = Counter()
        self._counters: Counter[str] = Counter()

    def submit(self, caller: Caller, request: AnyRequest, reply_to: ReplyTo, owner: object = None) -> None:
        """Perform or refuse a request. `reply_to` is called once, now or later."""
        job = Job(caller, request, reply_to, owner, self._clock)
        operation = job.operation
        for limit in (operation.name, ALL) if operation.audited else (operation.name,):
            if not self._rate_limiter.take(caller.uid, limit):
                reply_to(Outcome(self._rate_limited(job, limit)))
                return
        try:
            if operation.max_children:
                self._node.policy.check_operation(operation.name)
            operation.rule(self._node.policy, request)
            job.claim(self._node.sysfs_root)
            if any(self._busy[key] for key in job.excludes):
                raise OperationError(
                    ErrorCode.BUSY, "an earlier operation on this device has not finished: try again later"
                )
            if sum(waiting.operation is operation for waiting in self._queue) >= MAX_QUEUED:
                raise OperationError(ErrorCode.BUSY, f"{MAX_QUEUED} requests of this kind are already queued")
        except OperationError as error:
            reply_to(Outcome(self._refused(job, error.reply(request.id))))
            return
        if not operation.max_children:
            reply_to(perform(self._node, request))
            return
        if operation.audited:
            try:
                job.asked = self._audit.append(job.entry("asked"))
            except AuditError as error:
                reply_to(job.failed(ErrorCode.AUDIT, str(error)))
                return
        else:
            self._counters[operation.name] += 1
        self._busy.update(job.holds)
        self._queue.append(job)
        self._start()

    def reject(self, caller: Caller) -> OperationError:
        """Record a connection from a uid that is not admitted. Returns the error for whatever it requests."""
        error = denied("server-uid", f"uid {caller.uid} may not use this helper: see its option --server-uid")
        entry = Entry(event="refused", peer=caller, verdict="denied", result=fields_of(error.reply(0)))
        if self._rate_limiter.take(_REJECTED_UIDS, ALL):
            with suppress(AuditError):  # it is rejected either way, and the log's error is already reported
                self._audit.append(entry)
        else:
            self._counters["turned away, not written"] += 1
        return error

    def timeout(self) -> float | None:
        """Seconds until `expire` has work to do, None for never."""
        deadlines = [job.deadline for job in self._unanswered()]
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def expire(self) -> None:
        """Answer "timed out" for each job that has outlasted its deadline."""
        now = self._clock()
        for job in [job for job in self._unanswered() if job.deadline <= now]:
            why = f"{job.operation.name} did not finish in time: it may still complete"
            outcome = job.failed(ErrorCode.TIMED_OUT, why)
            if job in self._queue:
                self._queue.remove(job)
                self._finish(job, outcome)
            else:
                job.timed_out = True
                job.reply_to(outcome)

    def cancel(self, owner: object) -> None:
        """The client has disconnected: its queued jobs end as unavailable; running jobs continue and are audited."""
        for job in [job for job in self._queue if job.owner is owner]:
            self._queue.remove(job)
            self._finish(job, job.failed(ErrorCode.UNAVAILABLE, "the client disconnected before the operation began"))

    def stop(self) -> None:
        """Write the audit log's last line. Children that are still working are left to finish."""
        unfinished = [*self._queue, *self._running.values()]
        fields: Fields = dict(self._counters)
        if unfinished:
            shown = unfinished[:_LISTED]
            fields["unfinished"] = ", ".join(f"{job.operation.name} (asked {job.asked})" for job in shown)
            fields["unfinished_number"] = len(unfinished)
        self._audit.enqueue(Entry(event="stop", arguments=fields))

    def _unanswered(self) -> list[Job]:
        return [job for job in (*self._queue, *self._running.values()) if not job.timed_out]

    def _refused(self, job: Job, reply: Failure) -> AnyReply:
        """The reply to a refused job. A refusal that must be recorded but cannot be becomes an audit failure."""
        if not job.operation.audited:  # reads: only denials are recorded, within the rate limit of audited operations
            if reply.code is not ErrorCode.DENIED:
                return reply
            if not self._rate_limiter.take(job.caller.uid, ALL):
                self._counters[f"{job.operation.name} denied, not written"] += 1
                return reply
        try:
            self._audit.append(job.entry("refused", reply.code.value, reply))
        except AuditError as audit_error:
            return OperationError(ErrorCode.AUDIT, str(audit_error)).reply(job.request.id)
        return reply

    def _rate_limited(self, job: Job, limit: str) -> AnyReply:
        """The reply to a job beyond a rate limit. Only the first in a row is recorded: many must not fill the disk."""
        rate, what = self._node.policy.rates[limit], "audited requests" if limit == ALL else job.operation.name
        error = OperationError(
            ErrorCode.BUSY,
            f"rate limit: {rate.burst} {what} at once, then {rate.per_second:g} a second; send fewer, or raise "
            f"rates.{limit} in the helper's policy file",
            rule=f"rates.{limit}",
        )
        self._counters["refused, too many"] += 1
        reply = error.reply(job.request.id)
        first = self._rate_limiter.first_refusal(job.caller.uid, limit)
        if first and (limit == ALL or self._rate_limiter.take(job.caller.uid, ALL)):
            with suppress(AuditError):  # it is refused either way
                self._audit.append(job.entry("refused", error.code.value, reply))
        return reply

    def _start(self) -> None:
        full: set[str] = set()  # operations that can have no other child now
        for job in list(self._queue):
            if job not in self._queue:  # its client was dropped when an earlier job of this loop failed
                continue
            name = job.operation.name
            child = next((child for child, kind in self._idle.items() if kind == job.kind), None)
            if child is None and name in full:
                continue
            own = self._children[name] >= job.operation.max_children
            if child is None and (own or not self._has_room(job.operation)):
                full.add(name)
                self._dismiss(name, None if own else 0)  # idle ones: when they have exited, there is room
                continue
            self._queue.remove(job)
            try:
                child = child or Child(partial(perform, self._node))
            except OSError as error:
                why = f"cannot start a process for it: {os.strerror(error.errno or 0)}"
                self._finish(job, job.failed(ErrorCode.INTERNAL, why))
                continue
            if self._idle.pop(child, None) is None:  # a new child; idle ones are watched already
                self._children[name] += 1
                self._watch(child.channel.fileno(), partial(self._child_ready, child, name))
            self._running[child] = job
            child.begin(job.request)

    def _has_room(self, operation: Operation[AnyRequest]) -> bool:
        """Whether a child more leaves all other allowed operations the children that are reserved for them."""
        rows = [row for row in OPERATIONS.values() if row.name in self._node.policy.operations]
        taken = sum(max(self._children[row.name], row.least) for row in rows)
        return self._children[operation.name] < operation.least or taken < MAX_CHILDREN

    def _child_ready(self, child: Child, name: str) -> None:
        """The child has sent an outcome or has exited."""
        job, outcome = self._running.pop(child, None), child.outcome()
        if job is not None:
            why = "the operation's process ended without a result: see the helper's log"
            self._finish(job, outcome or job.failed(ErrorCode.INTERNAL, why))
        if outcome is None:
            self._unwatch(child.channel.fileno())
            child.channel.close()
            self._children[name] -= 1
            self._idle.pop(child, None)
        elif job is not None:
            self._idle[child] = job.kind
        self._start()
        self._dismiss("" if any(other.operation.name == name for other in self._running.values()) else name)

    def _dismiss(self, name: str, keep: int | None = None) -> None:
        """Dismiss the idle children of an operation, and the longest idle of all others beyond `keep` (MAX_IDLE)."""
        for number, (child, kind) in enumerate(reversed(list(self._idle.items()))):
            if kind[0] == name or number >= (MAX_IDLE if keep is None else keep):
                del self._idle[child]
                child.dismiss()

    def _finish(self, job: Job, outcome: Outcome) -> None:
        self._busy -= Counter(job.holds)
        if job.operation.audited:
            self._audit.enqueue(job.last_entry(outcome.reply))
        elif isinstance(outcome.reply, Failure):
            outcome = Outcome(self._refused(job, outcome.reply))
        if not job.timed_out:
            job.reply_to(outcome)
        elif outcome.descriptor is not None:
            os.close(outcome.descriptor)


def perform(node: Node, request: AnyRequest) -> Outcome:
    """Perform the request's operation now. Every expected error becomes a Failure."""
    try:
        return OPERATIONS[type(request)].function(node, request)
    except OperationError as error:
        return Outcome(error.reply(request.id))
    except SysfsError as error:
        code = ErrorCode.VANISHED if isinstance(error, MissingError) else ErrorCode.KERNEL
        return Outcome(OperationError(code, f"the device cannot be read: {error}").reply(request.id))
