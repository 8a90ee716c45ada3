"""Short-lived children: each does one request after another, and passes the outcomes back through a socket pair.

A child waits there for its next request, and ends with the pair. Whatever may wait inside the kernel happens in a
child, so that the serving loop never does. A child is never sent a signal, and ignores those that others send to all
processes of a service: a signal would make a blocked wait of the kernel's an unkillable one. Nor is it waited for: the
kernel closes its end of the pair when it ends, however it does.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

from qat_helper.errors import OperationError
from qat_helper.node import Outcome
from qat_shared.codec import ProtocolError, decode_reply, decode_request, encode
from qat_shared.messages import MAX_MESSAGE, AnyRequest, ErrorCode


class Child:
    """A process that does `work`. Its `channel` becomes readable when it has an outcome, or when it has ended.

    Raises OSError.
    """

    def __init__(self, work: Callable[[AnyRequest], Outcome]) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if os.fork() == 0:
                _run(work, theirs)
        # Not before it has closed what it inherited: the last close of a peer's descriptor, which may wait, is not its.
        self.channel.recv(1)
        self.channel.setblocking(False)

    def begin(self, request: AnyRequest) -> None:
        """Have it do that. Only while it has nothing else to do."""
        try:
            self.channel.send(encode(request))
        except OSError:  # it was killed, or there is no memory: the channel's end says so
            self.dismiss()

    def outcome(self) -> Outcome | None:
        """What it has passed back, None when it has ended. Only when the channel is readable."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.channel, MAX_MESSAGE, 1)
            reply = decode_reply(packet)
        except (OSError, ProtocolError):  # a reset: it was killed before it had begun
            return None
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # Python 3.11 does not pass MSG_CMSG_CLOEXEC on
        return Outcome(reply, descriptors[0] if descriptors else None)

    def dismiss(self) -> None:
        """Have it end. Only while it has nothing else to do."""
        self.channel.shutdown(socket.SHUT_WR)


def _run(work: Callable[[AnyRequest], Outcome], channel: socket.socket) -> NoReturn:
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        # The listener, the peers, the audit log: nothing of the parent's is to live on in here.
        os.closerange(3, channel.fileno())
        os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        channel.send(b"-")
        while packet := channel.recv(MAX_MESSAGE):
            reply, descriptor = work(decode_request(packet))
            try:
                socket.send_fds(channel, [encode(reply)], [] if descriptor is None else [descriptor])
            except OSError as error:  # ETOOMANYREFS: peers have not taken the descriptors that they were sent
                why = f"the connection cannot be passed: {os.strerror(error.errno or 0)}"
                channel.send(encode(OperationError(ErrorCode.BUSY, why).reply(reply.id)))
            if descriptor is not None:  # a Unix socket: that this was the last one of it keeps nobody waiting
                os.close(descriptor)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the helper was killed: nobody asks any more
    except BaseException:  # noqa: BLE001  the outermost edge of this process, which must not go on as a second helper
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)  # nobody asks with what
