"""Copies of the audit log's lines for whoever collects logs: standard output, or the systemd journal.

Nothing waits for a collector: a line that it has no room for is not copied. The sequence numbers tell which.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from functools import partial
from typing import Final

from qat_helper.audit import AuditError

_JOURNAL: Final = "/run/systemd/journal/socket"
_FIELDS: Final = b"PRIORITY=6\nSYSLOG_IDENTIFIER=qat-helper\nMESSAGE="


class Copy(StrEnum):
    """Where copies go."""

    NONE = "none"
    STDOUT = "stdout"
    JOURNAL = "journal"
    AUTO = "auto"


class Copies:
    """The copies of one log. Raises AuditError when there can be none. `send` never waits."""

    def __init__(self, where: Copy) -> None:
        self._write: Callable[[bytes], int] | None = None
        self._before = b""
        self._cut = False
        if where is Copy.STDOUT:
            try:  # a description of our own, since others may share the one that we were given and must not get EAGAIN
                own = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise AuditError(
                    f"audit lines cannot be copied to standard output ({os.strerror(error.errno or 0)}): "
                    "it must be a pipe, a file or a terminal"
                ) from error
            self._write = partial(os.write, own)
        elif where is Copy.JOURNAL or (where is Copy.AUTO and _is_journal()):
            # Its native protocol: one datagram for each entry (systemd.io/JOURNAL_NATIVE_PROTOCOL).
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._before = _FIELDS
            self._write = lambda entry: sock.sendto(entry, _JOURNAL)

    def send(self, line: bytes) -> None:
        """Copy a line, if there is room for it."""
        if self._write is not None:
            entry = b"\n" * self._cut + self._before + line + b"\n"
            with suppress(OSError):
                self._cut = self._write(entry) < len(entry)  # of a long line, a pipe may take the first part


def _is_journal() -> bool:
    """Whether the journal takes what we say (systemd.exec(5): JOURNAL_STREAM), so whether we are a service of its."""
    streams = {f"{status.st_dev}:{status.st_ino}" for status in map(os.fstat, (1, 2))}
    return os.environ.get("JOURNAL_STREAM") in streams
