"""One connection to the helper: it sends requests, and gives each answer to the caller that waits for its id.

Only client.py makes one, and no other code writes to the helper's socket.

Each packet is one message (SEQPACKET). A packet that is not a valid answer ends the connection. A descriptor is closed
when its caller no longer waits.
"""

import asyncio
import itertools
import os
import socket
from collections.abc import Callable
from typing import Final

from qat_server import logs
from qat_shared.codec import ProtocolError, decode_reply, encode
from qat_shared.messages import MAX_MESSAGE, AnyReply, AnyRequest, AuditHead, ErrorCode

log = logs.get(__name__)

_ENDED: Final = "the connection to the helper ended"


class HelperError(Exception):
    """The helper did not carry out an operation. `code` is the kind of failure, `message` a sentence for the user.

    `errno` is the kernel's error, 0 for none; `rule` names the policy rule that denied the operation, "" for none.
    """

    def __init__(self, code: ErrorCode, message: str, errno: int = 0, rule: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.errno = errno
        self.rule = rule


class HelperUnavailableError(HelperError):
    """There is no connection to the helper."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, message)


class Connection:
    """One connected socket and the calls that wait for an answer. `on_audit_head` is called with each answer's head.

    `ended` is done once no answer can come any more.
    """

    def __init__(self, sock: socket.socket, on_audit_head: Callable[[AuditHead], None]) -> None:
        self._sock = sock
        self._on_audit_head = on_audit_head
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._sending = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[tuple[AnyReply, int | None]]] = {}
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(sock, self._readable)

    def next_id(self) -> int:
        """An id that no earlier request on this connection had."""
        return next(self._ids) % 2**32

    async def exchange(self, request: AnyRequest) -> tuple[AnyReply, int | None]:
        """Send a request; return its answer and the descriptor passed with it, which the caller must close.

        Raises HelperUnavailableError.
        """
        packet = encode(request)
        if self.ended.done():
            raise HelperUnavailableError(_ENDED)
        answer: asyncio.Future[tuple[AnyReply, int | None]] = self._loop.create_future()
        self._waiting[request.id] = answer
        try:
            async with self._sending:
                try:
                    await self._loop.sock_sendall(self._sock, packet)
                except OSError as error:
                    raise HelperUnavailableError(f"{_ENDED}: {error_text(error)}") from error
            return await answer
        except BaseException:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                close_all(answer.result()[1])
            raise
        finally:
            self._waiting.pop(request.id, None)

    def close(self) -> None:
        """Close the socket. Calls that still wait raise HelperUnavailableError."""
        self._end()
        self._sock.close()

    def _readable(self) -> None:
        while True:
            try:
                packet, descriptors, flags, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 4, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                packet, descriptors, flags = b"", [], 0
            if not packet or flags & socket.MSG_TRUNC:
                close_all(*descriptors)
                self._end()
                return
            self._deliver(packet, descriptors)

    def _deliver(self, packet: bytes, passed: list[int]) -> None:
        try:
            reply = decode_reply(packet)
        except ProtocolError as error:
            log.error("invalid answer from the helper", why=str(error))
            close_all(*passed)
            self._end()
            return
        self._on_audit_head(reply.audit)  # here, since callers may run in another order than the answers came
        answer = self._waiting.get(reply.id)
        if answer is None or answer.done():
            close_all(*passed)
            return
        close_all(*passed[1:])
        answer.set_result((reply, passed[0] if passed else None))

    def _end(self) -> None:
        # The reader is removed at once: a socket at its end stays readable for ever.
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(HelperUnavailableError(_ENDED))
        if not self.ended.done():
            self.ended.set_result(None)


def close_all(*descriptors: int | None) -> None:
    """Close these descriptors; None is skipped."""
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)


def error_text(error: Exception) -> str:
    """The error's text without its number; its type only when it has no text."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
