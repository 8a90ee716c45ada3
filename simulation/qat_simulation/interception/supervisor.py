"""Starts a program so that its writes beneath some folders are answered by us instead of by the file system.

seccomp user notification (Linux 5.5): the program's write(2), and that of all its children, stops in the kernel until
the supervisor has said what it returns. Writes elsewhere go on at once as they are. A handler may answer later, or
never: that holds up the one writer only. This is no security boundary; it is how a plain folder can act like sysfs.
"""

import contextlib
import errno
import fcntl
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from qat_simulation.interception import launch

log = logging.getLogger(__name__)

WRITE_LIMIT: Final = 4096  # sysfs takes one page of a write; the rest is the writer's to write again
Handler = Callable[[str, bytes], "int | Future[int] | None"]
"""Given a path and what is written to it: the number of bytes written, or a negative errno; or such a number later.

None lets the write happen as it is.
"""

_NOTIF_RECV: Final = 0xC0502100
_NOTIF_SEND: Final = 0xC0182101
_NOTIF_ID_VALID: Final = 0x80082102  # the number of Linux 5.5; newer kernels know both
_NOTIF: Final = struct.Struct("QIIiIQ6Q")  # id, pid, flags, then seccomp_data: number, architecture, ip, arguments
_RESPONSE: Final = struct.Struct("QqiI")  # id, value, error, flags
_FLAG_CONTINUE: Final = 1
_DELETED: Final = " (deleted)"


class InterceptionError(Exception):
    """This system cannot intercept writes; the sentence says what it needs."""


class Supervisor:
    """Answers the writes of one program and its children. Made by `spawn`; ends with them, or by `stop`."""

    def __init__(self, listener: int, roots: Sequence[Path], handler: Handler) -> None:
        self.intercepted = 0
        self._listener = listener
        self._roots = tuple(f"{os.path.realpath(root)}/" for root in roots)
        self._handler = handler
        self._lock = threading.Lock()  # the listener must not be closed, and its number used again, beside an answer
        self._complained = False
        self._wake_end, self._wake = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="write supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End. Writes of programs that are still running then fail with ENOSYS, so end those first."""
        with self._lock:
            self._close_wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def ended(self) -> bool:
        """Whether the program and all its children are gone, or `stop` was called."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake_end, 0)  # only its hang-up
        try:
            while True:
                events = dict(poll.poll())
                if self._wake_end in events:
                    return
                state = events.get(self._listener, 0)
                if state & select.POLLIN:
                    self._receive()
                elif state:  # POLLHUP: nobody has the filter any more
                    return
        finally:
            with self._lock:
                os.close(self._listener)
                os.close(self._wake_end)
                self._close_wake()
                self._listener = -1

    def _close_wake(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _receive(self) -> None:
        buffer = bytearray(256)  # longer than the kernel's struct, should it grow
        try:
            fcntl.ioctl(self._listener, _NOTIF_RECV, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # the writer was killed meanwhile
                return
            raise
        notification, pid, _, _, _, _, descriptor, address, count, *_ = _NOTIF.unpack_from(buffer)
        result: int | Future[int] | None
        try:
            result = self._decide(notification, pid, descriptor, address, count)
        except Exception:  # the outermost edge of this thread: one write must not end the others'
            log.exception("a write could not be answered")
            result = -errno.EIO
        if isinstance(result, Future):
            result.add_done_callback(lambda future: self._answer(notification, future.result()))
        else:
            self._answer(notification, result)

    def _decide(
        self, notification: int, pid: int, descriptor: int, address: int, count: int
    ) -> "int | Future[int] | None":
        """What the write returns; None: let it happen."""
        try:
            # The kernel looks at the lower half of the register only.
            path = os.readlink(f"/proc/{pid}/fd/{descriptor & 0xFFFFFFFF}")
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                self._complain(pid, error)
            return None
        # A file that we have replaced since the writer opened it. To sysfs it is the same attribute.
        path = path.removesuffix(_DELETED)
        if not path.startswith(self._roots):
            return None
        try:
            data = _read_memory(pid, address, min(count, WRITE_LIMIT))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                self._complain(pid, error)
                return -errno.EIO
            return -errno.EFAULT
        except OverflowError:
            return -errno.EFAULT
        if not self._valid(notification):  # the process id may be another's by now, and so may be what was read
            return -errno.EINTR
        self.intercepted += 1
        return self._handler(path, data)

    def _valid(self, notification: int) -> bool:
        try:
            fcntl.ioctl(self._listener, _NOTIF_ID_VALID, struct.pack("Q", notification))
        except OSError:
            return False
        return True

    def _answer(self, notification: int, result: int | None) -> None:
        if result is None:
            response = _RESPONSE.pack(notification, 0, 0, _FLAG_CONTINUE)
        elif result < 0:
            response = _RESPONSE.pack(notification, 0, result, 0)
        else:
            response = _RESPONSE.pack(notification, result, 0, 0)
        with self._lock:
            if self._listener < 0:
                return
            try:
                fcntl.ioctl(self._listener, _NOTIF_SEND, response)
            except OSError as error:
                if error.errno != errno.ENOENT:  # ENOENT: the writer did not live to hear it
                    raise

    def _complain(self, pid: int, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            log.error(
                "writes of a supervised process cannot be looked at: it must be of our own user and dumpable, "
                "and kernel.yama.ptrace_scope at most 1",
                extra={"fields": {"pid": pid, "why": os.strerror(error.errno or 0)}},
            )


def spawn(
    argv: Sequence[str], roots: Sequence[Path], handler: Handler, **popen: Any
) -> "tuple[subprocess.Popen[Any], Supervisor]":
    """Start a program whose writes beneath `roots` go to `handler`; further arguments are those of Popen.

    Raises OSError as Popen does when the program cannot be started, InterceptionError where the system cannot do it.
    The handler is called in the supervisor's thread: an answer that takes long must be a Future.
    """
    if os.uname().machine not in launch.MACHINES:
        raise InterceptionError(f"intercepting writes is not known for {os.uname().machine}: {_NEEDED}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            passed = (*popen.pop("pass_fds", ()), theirs.fileno())
            # The launcher needs nothing but the standard library: -I -S makes its start as fast as can be.
            launcher = [sys.executable, "-I", "-S", launch.__file__, str(theirs.fileno()), "--", *argv]
            process = subprocess.Popen(launcher, pass_fds=passed, **popen)
        try:
            message, descriptors, _, _ = socket.recv_fds(ours, 64, 1)
            if not descriptors:
                raise InterceptionError(_why_not(message))
            supervisor = Supervisor(descriptors[0], roots, handler)
        except BaseException:
            _end(process)
            raise
        failure = ours.recv(64)  # the end of the stream is the program's start
    if failure:
        _end(process)
        supervisor.stop()
        number = int(failure.split()[1])
        raise OSError(number, os.strerror(number), argv[0])
    return process, supervisor


_NEEDED: Final = "needed are Linux 5.5 or newer with seccomp user notification, on x86_64 or aarch64"


def _why_not(message: bytes) -> str:
    reason = ""
    with contextlib.suppress(IndexError, ValueError):
        reason = f" ({os.strerror(int(message.split()[1]))})"
    return f"the simulated node cannot intercept writes on this system{reason}: {_NEEDED}, not already used by another"


def _end(process: "subprocess.Popen[Any]") -> None:
    process.kill()
    process.wait()


def _read_memory(pid: int, address: int, count: int) -> bytes:
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(descriptor, count, address) if count else b""
    finally:
        os.close(descriptor)
    if len(data) < count:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return data
