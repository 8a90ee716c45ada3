"""The serving loop: one thread, one epoll, peers on a SEQPACKET socket. It waits for nothing else, ever.

Theory of operation: each readiness is handled alone (one packet, one new peer, one ended child), so that no peer holds
up the others. A peer says Hello, then may ask; while as many of its requests are in flight as are allowed, it is not
read from. Answers that do not fit into its socket wait in a short queue; a peer that lets that queue run full is
dropped. Without requests in flight, or connections that wait to be closed, there is no time-out: an idle
helper does not wake up.
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
from contextlib import suppress
from functools import partial
from typing import Final

import msgspec

from qat_helper.audit import AuditLog, Caller
from qat_helper.console import log
from qat_helper.dispatch import Dispatcher
from qat_helper.errors import OperationError
from qat_helper.node import Node, Outcome
from qat_shared.codec import ProtocolError, decode_request, encode
from qat_shared.messages import MAX_MESSAGE, AnyRequest, ErrorCode, Hello, OpenKubeletSocket, Welcome

MAX_PEERS: Final = 16
MAX_UNDISPOSED: Final = 32
"""Connections that have ended and cannot be closed, for want of a process to do it."""
MAX_IN_FLIGHT: Final = 64
"""Requests of one peer that are not answered yet."""
MAX_QUEUE: Final = 32
"""Answers to one peer that its socket has no room for."""
MAX_PASSED: Final = 16
"""Descriptors passed to one peer that it may not have taken yet."""
_FULL: Final = OperationError(ErrorCode.BUSY, "take the connections that were passed to you before asking for more")
_INT: Final = struct.Struct("i")
_CREDENTIALS: Final = struct.Struct("iII")
_GONE: Final = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP


class Peer:
    """One connection. `turned_away`: what it is told instead of an answer, before the connection is closed."""

    def __init__(self, sock: socket.socket, caller: Caller) -> None:
        self.sock = sock
        self.caller = caller
        self.turned_away: OperationError | None = None
        self.greeted = False
        self.in_flight = 0
        self.passed = 0  # descriptors, since it had last read everything
        self.queue: deque[tuple[bytes, int | None]] = deque()
        self.open = True


class Server:
    """Serves on a listening socket until SIGTERM or SIGINT."""

    def __init__(self, listener: socket.socket, node: Node, audit: AuditLog) -> None:
        self._listener = listener
        self._node = node
        self._audit = audit
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[int], None]] = {}
        self._peers: list[Peer] = []
        self._undisposed: list[socket.socket] = []
        self._stopping = False
        self._listening = False
        self._dispatcher = Dispatcher(node, audit, self._watch_child, self._unwatch)

    def run(self) -> None:
        """Until a signal asks for the end. Leaves the last line of the audit log."""
        wake_end, wake = socket.socketpair()
        with wake_end, wake, self._epoll:
            wake.setblocking(False)
            signal.set_wakeup_fd(wake.fileno())
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that nothing is left of processes that end
            self._watch(wake_end.fileno(), select.EPOLLIN, self._stop)
            self._listen()
            log(f"serving on {os.fsdecode(self._listener.getsockname())}")
            while not self._stopping:
                # One at a time: what is handled may close descriptors that others in the same batch are about.
                for descriptor, events in self._epoll.poll(1 if self._undisposed else self._dispatcher.timeout(), 1):
                    self._calls[descriptor](events)
                self._dispatcher.expire()
                self._dispose()
            signal.set_wakeup_fd(-1)
            for peer in list(self._peers):
                self._drop(peer)
            self._dispose()
        self._dispatcher.stop()

    def _listen(self) -> None:
        if not self._listening and not self._stopping:
            self._watch(self._listener.fileno(), select.EPOLLIN, self._accept)
            self._listening = True

    def _stop(self, _: int) -> None:
        self._stopping = True

    def _watch(self, descriptor: int, events: int, call: Callable[[int], None]) -> None:
        self._calls[descriptor] = call
        self._epoll.register(descriptor, events)

    def _unwatch(self, descriptor: int) -> None:
        del self._calls[descriptor]
        self._epoll.unregister(descriptor)

    def _watch_child(self, descriptor: int, call: Callable[[], None]) -> None:
        self._watch(descriptor, select.EPOLLIN, lambda _: call())

    def _accept(self, _: int) -> None:
        try:
            if len(self._undisposed) >= MAX_UNDISPOSED:  # they must not use up what it takes to be rid of them
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the listener stays readable, so it is left alone until a peer has gone.
            log(f"no connection can be taken until one ends: {os.strerror(error.errno or 0)}")
            self._unwatch(self._listener.fileno())
            self._listening = False
            for peer in [peer for peer in self._peers if not peer.greeted]:
                self._drop(peer)
            return
        sock.setblocking(False)
        caller = Caller(*_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))
        peer = Peer(sock, caller)
        if caller.uid not in self._node.policy.uids:
            peer.turned_away = self._dispatcher.turn_away(caller)
        elif sum(other.caller.uid == caller.uid for other in self._peers) >= MAX_PEERS:
            peer.turned_away = OperationError(ErrorCode.BUSY, f"the helper serves {MAX_PEERS} connections already")
        self._peers.append(peer)
        self._watch(sock.fileno(), self._events(peer), partial(self._ready, peer))
        # They stay until they have asked something, but not so many of them.
        turned_away = [other for other in self._peers if other.turned_away]
        if len(turned_away) > MAX_PEERS:
            self._drop(turned_away[0])

    def _ready(self, peer: Peer, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush(peer)
        if peer.open and events & select.EPOLLIN:
            self._receive(peer, events)
        elif peer.open and events & _GONE:
            self._drop(peer)

    def _receive(self, peer: Peer, events: int) -> None:
        try:
            # A look first: to receive descriptors that nobody asked for is to close them, and the last close of one may
            # wait for as long as its maker likes (a socket that lingers). There is room for credentials only.
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
        if not packet and events & _GONE:
            self._drop(peer)
            return
        try:
            request = decode_request(packet)
        except ProtocolError as error:
            trouble = peer.turned_away or OperationError(ErrorCode.MALFORMED, str(error))
            self._answer(peer, Outcome(trouble.reply(0)))
            return
        self._request(peer, request)

    def _request(self, peer: Peer, request: AnyRequest) -> None:
        error = peer.turned_away
        if error is None and not peer.greeted and not isinstance(request, Hello):
            error = OperationError(ErrorCode.PROTOCOL, "say Hello first, so that both versions are known to fit")
        if error is not None:
            self._answer(peer, Outcome(error.reply(request.id)))
        else:
            peer.in_flight += 1
            if isinstance(request, OpenKubeletSocket) and not self._takes_descriptors(peer):
                self._answered(peer, Outcome(_FULL.reply(request.id)))
                return
            self._dispatcher.ask(peer.caller, request, partial(self._answered, peer), peer)
            self._update(peer)

    def _takes_descriptors(self, peer: Peer) -> bool:
        """Whether it reads what it is passed: descriptors under way count against all processes of our uid."""
        (unread,) = _INT.unpack(fcntl.ioctl(peer.sock, termios.TIOCOUTQ, bytes(_INT.size)))
        if not unread and not peer.queue:
            peer.passed = 0
        return peer.passed < MAX_PASSED

    def _answered(self, peer: Peer, outcome: Outcome) -> None:
        peer.in_flight -= 1
        if isinstance(outcome.reply, Welcome):
            peer.greeted = True
        if outcome.descriptor is not None and peer.open:
            if self._takes_descriptors(peer):
                peer.passed += 1
            else:  # it had asked for all of them before the first was there
                os.close(outcome.descriptor)
                outcome = Outcome(_FULL.reply(outcome.reply.id))
        self._answer(peer, outcome)

    def _answer(self, peer: Peer, outcome: Outcome) -> None:
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
        if peer.turned_away and not peer.queue:
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
        """Close the connection; what is begun for it still ends, and is audited."""
        if not peer.open:
            return
        peer.open = False
        self._peers.remove(peer)
        self._unwatch(peer.sock.fileno())
        self._dispatcher.forget(peer)
        if _unread(peer.sock):
            self._undisposed.append(peer.sock)
        else:
            peer.sock.close()
        for _, descriptor in peer.queue:
            _close(descriptor)
        peer.queue.clear()
        self._listen()

    def _dispose(self) -> None:
        """Close the sockets of peers that have gone and left something unread.

        What was sent may hold descriptors, and the last close of one may wait. A process that exits does not wait for a
        lingering socket (the kernel's PF_EXITING), and if it waits for something else, it is not we who do. When there
        can be no such process, which a peer may have brought about, they stay as they are until the next attempt.
        """
        if not self._undisposed:
            return
        with suppress(OSError):
            end, ours = os.pipe()
            try:
                if os.fork() == 0:
                    os.close(ours)
                    os.read(end, 1)  # until the parent has closed its own
                    os._exit(0)
                for sock in self._undisposed:
                    sock.close()
                self._undisposed.clear()
            finally:
                os.close(end)
                os.close(ours)
            self._listen()


def _unread(sock: socket.socket) -> bool:
    """End it both ways: whether something is left there. Each packet, if only an empty one, comes with credentials."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
        return bool(sock.recvmsg(1, 0, socket.MSG_PEEK)[2] & socket.MSG_CTRUNC)
    return False


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
