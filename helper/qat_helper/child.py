"""Short-lived children: each does one operation, passes its outcome back through a socket pair, and ends.

Whatever may wait inside the kernel happens in a child, so that the serving loop never does. A child is never sent a
signal, and ignores those that others send to all processes of a service: a signal would make a blocked wait of the
kernel's an unkillable one.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

from qat_helper.errors import OperationError
from qat_helper.node import Outcome
from qat_shared.codec import ProtocolError, decode_reply, encode
from qat_shared.messages import MAX_MESSAGE, ErrorCode

_BEGIN: Final = b"begin"


class Child:
    """A child at work. Its `pidfd` becomes readable when it has ended; then take its `outcome`. Raises OSError."""

    def __init__(self, work: Callable[[], Outcome]) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = os.fork()
            if self.pid == 0:
                _run(work, theirs)
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._channel.close()  # not told to begin, it ends
            os.waitpid(self.pid, 0)
            raise
        with suppress(OSError):  # it was killed already: its outcome will say so
            self._channel.send(_BEGIN)

    def outcome(self) -> Outcome:
        """What it has passed back. Only once it has ended. Raises OperationError when it has passed nothing."""
        packet: bytes = b""
        descriptors: list[int] = []
        with self._channel, suppress(OSError):  # a reset: it was killed before it had begun
            self._channel.setblocking(False)
            packet, descriptors, _, _ = socket.recv_fds(self._channel, MAX_MESSAGE, 1)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # Python 3.11 does not pass MSG_CMSG_CLOEXEC on
        os.close(self.pidfd)
        _, status = os.waitpid(self.pid, 0)
        try:
            return Outcome(decode_reply(packet), descriptors[0] if descriptors else None)
        except ProtocolError:
            raise OperationError(
                ErrorCode.INTERNAL,
                f"the operation's process ended with status {os.waitstatus_to_exitcode(status)}: see the helper's log",
            ) from None


def _run(work: Callable[[], Outcome], channel: socket.socket) -> NoReturn:
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        # The listener, the peers, the audit log: nothing of the parent's is to live on in here.
        os.closerange(3, channel.fileno())
        os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        if channel.recv(len(_BEGIN)) != _BEGIN:
            os._exit(status)
        reply, descriptor = work()
        try:
            socket.send_fds(channel, [encode(reply)], [] if descriptor is None else [descriptor])
        except OSError as error:  # ETOOMANYREFS: peers have not taken the descriptors that they were sent
            trouble = OperationError(
                ErrorCode.BUSY, f"the connection cannot be passed: {os.strerror(error.errno or 0)}"
            )
            channel.send(encode(trouble.reply(reply.id)))
        status = 0
    except BaseException:  # noqa: BLE001  the outermost edge of this process, which must not go on as a second helper
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)
