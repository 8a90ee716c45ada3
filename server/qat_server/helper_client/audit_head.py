"""Checks that the helper's audit log continues: whether each head in its answers can follow the head before.

A head is the number and the hash of the log's last line. Two rules can be checked with heads alone: the number never
decreases, and the same number always has the same hash. Whether the lines between two heads form one chain can only be
verified on the log itself (qat-helper audit verify --head). The last head survives restarts of the helper, but not of
the server.
"""

from typing import Final

from qat_server import logs
from qat_server.instrumentation.counters import Counters
from qat_shared.messages import AuditHead

log = logs.get(__name__)

_HASH_SHOWN: Final = 12  # characters


class AuditHeadMonitor:
    """`head` is the last head, `last_break` the last break of the rules, as a sentence ("" for none).

    `last_break` stays set, since no later answer can repair a break.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self.head: AuditHead | None = None
        self.last_break = ""

    def update(self, head: AuditHead) -> None:
        """Check the head of a new answer. A break is reported once: later heads are compared with the new head."""
        last, self.head = self.head, head
        if last is None or head.sequence > last.sequence or head == last:
            return
        how = "went back to" if head.sequence < last.sequence else "has another hash for"
        self.last_break = (
            f"the helper's audit log {how} line {head.sequence} ({head.hash[:_HASH_SHOWN]}) after line {last.sequence} "
            f"({last.hash[:_HASH_SHOWN]}): lines were removed or rewritten, or it is another log"
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
