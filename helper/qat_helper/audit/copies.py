"""Copies of the audit log's lines for a log collector: on standard output or in the systemd journal.

The helper never waits for a collector. A line for which the collector has no room is not copied; the gap in the
sequence numbers shows it.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import Final

from qat_helper.audit.log import AuditError

JOURNAL: Final = "/run/systemd/journal/socket"
_FIELDS: Final = b"PRIORITY=6\nSYSLOG_IDENTIFIER=qat-helper\nMESSAGE="


class Copy(StrEnum):
    """The destination of copies."""

    NONE = "none"
    STDOUT = "stdout"
    JOURNAL = "journal"
    AUTO = "auto"


def copier(where: Copy) -> Callable[[bytes], None]:
    """A function that copies one line. It never blocks and never raises. Raises AuditError."""
    if where is Copy.STDOUT:
        try:  # reopened: O_NONBLOCK on a shared open file description would affect its other users
            own = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise AuditError(f"cannot copy to standard output: it is not a pipe, file or terminal ({why})") from error
        # A line is shorter than PIPE_BUF, so a pipe takes all of it or nothing.
        return lambda line: _attempt(os.write, own, line + b"\n")
    if where is Copy.JOURNAL or (where is Copy.AUTO and _is_journal()):
        # The journal's native protocol: one datagram per entry (systemd.io/JOURNAL_NATIVE_PROTOCOL).
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        return lambda line: _attempt(sock.sendto, _FIELDS + line + b"\n", JOURNAL)
    return lambda line: None


def _attempt(send: Callable[..., int], *arguments: object) -> None:
    with suppress(OSError):
        send(*arguments)


def _is_journal() -> bool:
    """Whether the journal receives our output, so whether systemd started us (systemd.exec(5): JOURNAL_STREAM)."""
    streams = {f"{status.st_dev}:{status.st_ino}" for status in map(os.fstat, (1, 2))}
    return os.environ.get("JOURNAL_STREAM") in streams
