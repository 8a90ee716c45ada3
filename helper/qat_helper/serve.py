"""The serving loop: one thread and one epoll instance, for peers on a SEQPACKET socket. It blocks only in epoll.

Theory of operation: each epoll event (one packet, one new peer, one exited child) is handled on its own, so that no
peer delays the others. A peer sends Hello first. While MAX_IN_FLIGHT of its requests are in flight, the loop does not
read from it. Replies that do not fit into its socket wait in a short queue; a peer whose queue fills up is dropped. The
loop has a time-out only while requests are in flight or dropped connections wait to be closed: an idle helper never
wakes up.
"""

import errno
import fcntl
import os
import select
import signal
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Final

import msgspec

from qat_helper.audit.log import AuditLog, Caller
from qat_helper.console import log
from qat_helper.dispatch import Dispatcher
from qat_helper.errors import OperationError
from qat_helper.operations.node import Node, Outcome
from qat_helper.passed import PassedConnections
from qat_shared.codec import ProtocolError, decode_request, encode
from qat_shared.messages import MAX_MESSAGE, AnyRequest, ErrorCode, Hello, OpenPodResources, Welcome

MAX_PEERS: Final = 16
MAX_UNCLOSED: Final = 32
"""Dropped connections that cannot be closed yet, because no process can be started for that."""
MAX_IN_FLIGHT: Final = 64
"""Unanswered requests of one peer."""
MAX_QUEUE: Final = 32
"""Replies that one peer's socket has no room for."""
MAX_PASSED: Final = 16
"""Descriptors sent to one peer that it may not have received yet."""
_TOO_MANY_PASSED: Final = OperationError(ErrorCode.BUSY, "receive the passed connections before requesting more")
_INT: Final = struct.Struct("i")
_CREDENTIALS: Final = struct.Struct("iII")
_CLOSED: Final = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP


class Peer:
    """One connection. `rejection`: the error sent in place of a reply, before the connection is closed."""

    def __init__(self, sock: socket.socket, caller: Caller) -> None:
        self.sock = sock
        self.caller = caller
        self.rejection: OperationError | None = None
        self.greeted = False
        self.in_flight = 0
        self.passed = 0  # descriptors, since its socket was last empty
        self.queue: deque[tuple[bytes, int | None]] = deque()
        self.open = True


class Server:
    """Serves on a listening socket until SIGTERM or SIGINT."""

    def __init__(self, listener: socket.socket, node: Node, audit: AuditLog) -> None:
        self._listener = listener
        self._node = node
        self._audit = audit
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._peers: list[Peer] = []
        self._unclosed: list[socket.socket] = []
        self._passed = PassedConnections()
        self._closing = False
        self._stopping = False
        self._listening = False
        self._dispatcher = Dispatcher(node, audit, self._watch_child, self._unwatch)

    def run(self) -> None:
        """Serve until a signal arrives. Writes the audit log's last line."""
        wake_end, wake = socket.socketpair()
        with wake_end, wake, self._epoll:
            wake.setblocking(False)
            signal.set_wakeup_fd(wake.fileno())
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps exited children
            self._watch(wake_end.fileno(), select.EPOLLIN, self._stop)
            self._listen()
            log(f"serving on {os.fsdecode(self._listener.getsockname())}")
            while not self._stopping:
                # One event at a time: a handler may close descriptors of other events in a batch.
                for descriptor, events in self._epoll.poll(1 if self._unclosed else self._dispatcher.timeout(), 1):
                    self._handlers[descriptor](events)
                self._dispatcher.expire()
                self._close_dropped()
            signal.set_wakeup_fd(-1)
            for peer in list(self._peers):
                self._drop(peer)
            self._close_dropped()
        self._dispatcher.stop()

    def _listen(self) -> None:
        if not self._listening and not self._stopping:
            self._watch(self._listener.fileno(), select.EPOLLIN, self._accept)
            self._listening = True

    def _stop(self, _: int) -> None:
        self._stopping = True

    def _watch(self, descriptor: int, events: int, call: Callable[[int], None]) -> None:
        self._handlers[descriptor] = call
        self._epoll.register(descriptor, events)

    def _unwatch(self, descriptor: int) -> None:
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    def _watch_child(self, descriptor: int, call: Callable[[], None]) -> None:
        self._watch(descriptor, select.EPOLLIN, lambda _: call())

    def _accept(self, _: int) -> None:
        try:
            if len(self._unclosed) >= MAX_UNCLOSED:  # keep descriptors free for the process that closes them
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory. The listener stays readable, so it is not watched until a peer leaves.
            log(f"cannot accept a connection until another closes: {os.strerror(error.errno or 0)}")
            self._unwatch(self._listener.fileno())
            self._listening = False
            for peer in [peer for peer in self._peers if not peer.greeted]:
                self._drop(peer)
            return
        sock.setblocking(False)
        caller = Caller(*_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))
        peer = Peer(sock, caller)
        if caller.uid not in self._node.policy.uids:
            peer.rejection = self._dispatcher.reject(caller)
        elif sum(other.caller.uid == caller.uid for other in self._peers) >= MAX_PEERS:
            peer.rejection = OperationError(ErrorCode.BUSY, f"this uid already has {MAX_PEERS} connections")
        self._peers.append(peer)
        self._watch(sock.fileno(), self._events(peer), partial(self._ready, peer))
        # Rejected peers stay until they have sent a request, but only so many of them.
        rejected = [other for other in self._peers if other.rejection]
        if len(rejected) > MAX_PEERS:
            self._drop(rejected[0])

    def _ready(self, peer: Peer, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush(peer)
        if peer.open and events & select.EPOLLIN:
            self._receive(peer, events)
        elif peer.open and events & _CLOSED:
            self._drop(peer)

    def _receive(self, peer: Peer, events: int) -> None:
        try:
            # Peek first: receiving unwanted descriptors means closing them, and the last close of one may block for as
            # long as the sender likes (a lingering socket). There is room for credentials only.
            room = socket.CMSG_SPACE(_CREDENTIALS.size)
            if peer.sock.recvmsg(1, room, socket.MSG_PEEK)[2] & socket.MSG_CTRUNC:
                self._drop(peer)
                return
            packet = peer.sock.recvmsg(MAX_MESSAGE + 1)[0]  # decode_request refuses a longer one, cut or not
        except BlockingIOError:
            return
        except OSError:
            self._drop(peer)
            return
        if not packet and events & _CLOSED:
            self._drop(peer)
            return
        try:
            request = decode_request(packet)
        except ProtocolError as error:
            failure = peer.rejection or OperationError(ErrorCode.MALFORMED, str(error))
            self._send(peer, Outcome(failure.reply(0)))
            return
        self._request(peer, request)

    def _request(self, peer: Peer, request: AnyRequest) -> None:
        error = peer.rejection
        if error is None and not peer.greeted and not isinstance(request, Hello):
            error = OperationError(ErrorCode.PROTOCOL, "send Hello first, so that both versions can be compared")
        if error is not None:
            self._send(peer, Outcome(error.reply(request.id)))
        else:
            peer.in_flight += 1
            if isinstance(request, OpenPodResources) and not self._may_pass_descriptor(peer):
                self._complete(peer, Outcome(_TOO_MANY_PASSED.reply(request.id)))
                return
            self._dispatcher.submit(peer.caller, request, partial(self._complete, peer), peer)
            self._update(peer)

    def _may_pass_descriptor(self, peer: Peer) -> bool:
        """Whether few enough descriptors are in transit to the peer: they count against all processes of our uid."""
        (unread,) = _INT.unpack(fcntl.ioctl(peer.sock, termios.TIOCOUTQ, bytes(_INT.size)))
        if not unread and not peer.queue:
            peer.passed = 0
        return peer.passed < MAX_PASSED

    def _complete(self, peer: Peer, outcome: Outcome) -> None:
        peer.in_flight -= 1
        if isinstance(outcome.reply, Welcome):
            peer.greeted = True
        if outcome.descriptor is not None and peer.open:
            if self._may_pass_descriptor(peer):
                peer.passed += 1
                self._passed.add(peer, outcome.descriptor)
            else:  # it requested all of them before the first was passed
                os.close(outcome.descriptor)
                outcome = Outcome(_TOO_MANY_PASSED.reply(outcome.reply.id))
        self._send(peer, outcome)

    def _send(self, peer: Peer, outcome: Outcome) -> None:
        if not peer.open or len(peer.queue) >= MAX_QUEUE:
            _close(outcome.descriptor)
            self._drop(peer)
            return
        packet = encode(msgspec.structs.replace(outcome.reply, audit=self._audit.head))
        peer.queue.append((packet, outcome.descriptor))
        self._flush(peer)

    def _flush(self, peer: Peer) -> None:
        while peer.queue:
            packet, descriptor = peer.queue[0]
            try:
                socket.send_fds(peer.sock, [packet], [] if descriptor is None else [descriptor])
            except BlockingIOError:
                break
            except OSError:
                self._drop(peer)
                return
            peer.queue.popleft()
            _close(descriptor)
        if peer.rejection and not peer.queue:
            self._drop(peer)
        else:
            self._update(peer)

    def _update(self, peer: Peer) -> None:
        if peer.open:
            self._epoll.modify(peer.sock, self._events(peer))

    def _events(self, peer: Peer) -> int:
        reading = select.EPOLLIN | select.EPOLLRDHUP if peer.in_flight < MAX_IN_FLIGHT else 0
        return reading | (select.EPOLLOUT if peer.queue else 0)

    def _drop(self, peer: Peer) -> None:
        """Close the connection. Operations that have begun for it still end, and are audited."""
        if not peer.open:
            return
        peer.open = False
        self._peers.remove(peer)
        self._unwatch(peer.sock.fileno())
        self._dispatcher.cancel(peer)
        if _unread(peer.sock):
            self._unclosed.append(peer.sock)
        else:
            peer.sock.close()
        for _, descriptor in peer.queue:
            _close(descriptor)
        peer.queue.clear()
        self._passed.end_all(peer)
        self._listen()

    def _close_dropped(self) -> None:
        """Close the sockets of dropped peers that left something unread.

        Unread packets may hold descriptors, and the last close of one may block. A child process therefore holds copies
        until this process has closed its own. An exiting process does not wait for a lingering socket (the kernel's
        PF_EXITING), and if it waits for anything else, this process does not, and its memory is already released. If no
        child can be started, which a peer may have caused, the sockets stay open until the next attempt. Only one such
        child at a time takes memory: the next is started when this one's end of the channel is closed.
        """
        if not self._unclosed or self._closing:
            return
        with suppress(OSError), ExitStack() as stack:
            ours, end = (stack.enter_context(each) for each in socket.socketpair())
            if os.fork() == 0:
                ours.close()
                end.recv(1)  # until the parent has closed its copies
                end.close()
                os._exit(0)
            for sock in self._unclosed:
                sock.close()
            self._unclosed.clear()
            stack.pop_all()
            end.close()
            ours.shutdown(socket.SHUT_WR)
            self._closing = True
            self._watch(ours.fileno(), select.EPOLLIN, partial(self._closed, ours))
            self._listen()

    def _closed(self, channel: socket.socket, _: int) -> None:
        self._unwatch(channel.fileno())
        channel.close()
        self._closing = False


def _unread(sock: socket.socket) -> bool:
    """Shut the socket down; whether anything is left unread. Even an empty packet comes with credentials."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
        return bool(sock.recvmsg(1, 0, socket.MSG_PEEK)[2] & socket.MSG_CTRUNC)
    return False


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
