"""Short-lived child processes: each performs one request after another and returns the outcomes over a socket pair.

A child waits on the pair for its next request, and exits when the pair closes. Everything that may block inside the
kernel runs in a child, so that the serving loop never blocks. A child is never sent a signal, and it ignores those that
others send to all processes of a service: a signal would make a blocked wait in the kernel unkillable. Nobody waits for
a child: when it exits, for whatever reason, the kernel closes its end of the pair.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

from qat_helper.errors import OperationError
from qat_helper.operations.node import Outcome
from qat_shared.codec import ProtocolError, decode_reply, decode_request, encode
from qat_shared.messages import MAX_MESSAGE, AnyRequest, ErrorCode


class Child:
    """A process that runs `work`. Its `channel` becomes readable when an outcome is there or the process has exited.

    Raises OSError.
    """

    def __init__(self, work: Callable[[AnyRequest], Outcome]) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if os.fork() == 0:
                _run(work, theirs)
        # The child first closes what it inherited: the last close of a peer's descriptor may block, and must be ours.
        self.channel.recv(1)
        self.channel.setblocking(False)

    def begin(self, request: AnyRequest) -> None:
        """Send it a request. Only while it is idle."""
        try:
            self.channel.send(encode(request))
        except OSError:  # it was killed, or there is no memory: the channel then closes
            self.dismiss()

    def outcome(self) -> Outcome | None:
        """The outcome that it sent, None when it has exited. Only when the channel is readable."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.channel, MAX_MESSAGE, 1)
            reply = decode_reply(packet)
        except (OSError, ProtocolError):  # a reset: it was killed before it began
            return None
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # Python 3.11 does not pass MSG_CMSG_CLOEXEC to the kernel
        return Outcome(reply, descriptors[0] if descriptors else None)

    def dismiss(self) -> None:
        """Let it exit. Only while it is idle."""
        self.channel.shutdown(socket.SHUT_WR)


def _run(work: Callable[[AnyRequest], Outcome], channel: socket.socket) -> NoReturn:
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        # Nothing of the parent's may stay open here: the listener, the peers, the audit log.
        os.closerange(3, channel.fileno())
        os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        channel.send(b"-")
        while packet := channel.recv(MAX_MESSAGE):
            reply, descriptor = work(decode_request(packet))
            try:
                socket.send_fds(channel, [encode(reply)], [] if descriptor is None else [descriptor])
            except OSError as error:  # ETOOMANYREFS: peers have not received the descriptors sent to them
                why = f"the descriptor cannot be passed: {os.strerror(error.errno or 0)}"
                channel.send(encode(OperationError(ErrorCode.BUSY, why).reply(reply.id)))
            if descriptor is not None:  # a Unix socket, so even the last close does not block
                os.close(descriptor)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the helper was killed
    except BaseException:  # noqa: BLE001  the outermost edge of this process, which must not go on as a second helper
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)  # nobody reads the status
