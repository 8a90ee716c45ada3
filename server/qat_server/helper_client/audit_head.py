"""The helper's audit log as its answers show it: whether each head that they bring can follow the one before.

An answer brings the head: number and hash of the log's last line. From that alone, two things can be told: the number
never goes back, and the same number has the same hash. Whether what lies between two heads is one chain, only the log
itself tells (qat-helper audit verify --head). What was heard is kept over restarts of the helper, not over our own.
"""

from typing import Final

from qat_server import logs
from qat_server.instrumentation.counters import Counters
from qat_shared.messages import AuditHead

log = logs.get(__name__)

_SHOWN: Final = 12


class AuditWatch:
    """The last head that was heard of, and what did not follow."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self.head: AuditHead | None = None
        self.broken = ""
        """The last break, as a sentence; it stays, since no later answer mends it."""

    def heard(self, head: AuditHead) -> None:
        """An answer brought this head. A break is told once: what follows is compared with the new head."""
        last, self.head = self.head, head
        if last is None or head.sequence > last.sequence or head == last:
            return
        how = "went back to" if head.sequence < last.sequence else "has another hash for"
        self.broken = (
            f"the helper's audit log {how} line {head.sequence} ({head.hash[:_SHOWN]}) after line {last.sequence} "
            f"({last.hash[:_SHOWN]}): lines were removed or written anew, or it is another log"
        )
        self._counters.audit_break()
        log.error(
            "audit log does not continue",
            last_sequence=last.sequence,
            last_hash=last.hash,
            sequence=head.sequence,
            hash=head.hash,
            hint="qat-helper audit verify --head LAST_SEQUENCE:LAST_HASH",
        )
