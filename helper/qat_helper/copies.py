"""Copies of the audit log's lines for whoever collects logs: standard output, or the systemd journal.

Nothing waits for a collector: a line that it has no room for is not copied. The sequence numbers tell which.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import Final

from qat_helper.audit import AuditError

JOURNAL: Final = "/run/systemd/journal/socket"
_FIELDS: Final = b"PRIORITY=6\nSYSLOG_IDENTIFIER=qat-helper\nMESSAGE="


class Copy(StrEnum):
    """Where copies go."""

    NONE = "none"
    STDOUT = "stdout"
    JOURNAL = "journal"
    AUTO = "auto"


def copier(where: Copy) -> Callable[[bytes], None]:
    """What is to be called with each line; it never waits, and never raises. Raises AuditError."""
    if where is Copy.STDOUT:
        try:  # opened anew: others may share what we were given, and are not to be kept from waiting
            own = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise AuditError(f"no copies to standard output: it is no pipe, file or terminal ({why})") from error
        # A line is shorter than PIPE_BUF, so a pipe takes it whole or not at all.
        return lambda line: _attempt(os.write, own, line + b"\n")
    if where is Copy.JOURNAL or (where is Copy.AUTO and _is_journal()):
        # Its native protocol: one datagram for each entry (systemd.io/JOURNAL_NATIVE_PROTOCOL).
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        return lambda line: _attempt(sock.sendto, _FIELDS + line + b"\n", JOURNAL)
    return lambda line: None


def _attempt(send: Callable[..., int], *arguments: object) -> None:
    with suppress(OSError):
        send(*arguments)


def _is_journal() -> bool:
    """Whether the journal takes what we say (systemd.exec(5): JOURNAL_STREAM), so whether we are a service of its."""
    streams = {f"{status.st_dev}:{status.st_ino}" for status in map(os.fstat, (1, 2))}
    return os.environ.get("JOURNAL_STREAM") in streams
