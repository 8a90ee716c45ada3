"""Starts a program and answers its writes beneath some directories in place of the file system.

It uses seccomp user notification (Linux 5.5): each write(2) of the program and its children blocks in the kernel until
the supervisor sends its result. Writes elsewhere continue unchanged. A handler may answer later or never, which blocks
only that writer. This is no security boundary; it makes a plain directory behave like sysfs.
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

WRITE_LIMIT: Final = 4096  # sysfs accepts one page of a write; the writer has to write the rest again
Handler = Callable[[str, bytes], "int | Future[int] | None"]
"""Gets a path and the data written to it, and returns the number of bytes accepted, or a negative errno.

A Future answers later with such a number. None lets the write continue unchanged.
"""

_NOTIF_RECV: Final = 0xC0502100
_NOTIF_SEND: Final = 0xC0182101
_NOTIF_ID_VALID: Final = 0x80082102  # the number of Linux 5.5; newer kernels know both
_NOTIF: Final = struct.Struct("QIIiIQ6Q")  # id, pid, flags, then seccomp_data: number, architecture, ip, arguments
_RESPONSE: Final = struct.Struct("QqiI")  # id, value, error, flags
_FLAG_CONTINUE: Final = 1
_DELETED: Final = " (deleted)"


class InterceptionError(Exception):
    """This system cannot intercept writes; the message says what is required."""


class Supervisor:
    """Answers the writes of one program and its children. Made by `spawn`; ends with them, or on `stop`."""

    def __init__(self, listener: int, roots: Sequence[Path], handler: Handler) -> None:
        self._listener = listener
        self._roots = tuple(f"{os.path.realpath(root)}/" for root in roots)
        self._handler = handler
        self._lock = threading.Lock()  # the listener must not be closed, and its number reused, during an answer
        self._access_error_logged = False
        self._wake_end, self._wake = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="write supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End. Writes of programs that still run fail with ENOSYS from then on, so end the programs first."""
        with self._lock:
            self._close_wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def ended(self) -> bool:
        """Whether the program and all its children have ended, or `stop` was called."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake_end, 0)  # only for its hang-up
        try:
            while True:
                events = dict(poll.poll())
                if self._wake_end in events:
                    return
                state = events.get(self._listener, 0)
                if state & select.POLLIN:
                    self._receive()
                elif state:  # POLLHUP: no process has the filter any more
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
        buffer = bytearray(256)  # longer than the kernel's struct, in case it grows
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
        except Exception:  # the outermost edge of this thread: an error in one write must not stop the others
            log.exception("a write could not be answered")
            result = -errno.EIO
        if isinstance(result, Future):
            result.add_done_callback(lambda future: self._answer(notification, future.result()))
        else:
            self._answer(notification, result)

    def _decide(
        self, notification: int, pid: int, descriptor: int, address: int, count: int
    ) -> "int | Future[int] | None":
        """The write's result; None lets it continue."""
        try:
            # The kernel uses only the lower half of the register.
            path = os.readlink(f"/proc/{pid}/fd/{descriptor & 0xFFFFFFFF}")
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                self._log_access_error(pid, error)
            return None
        # The file was replaced since the writer opened it. In sysfs it would still be the same attribute.
        path = path.removesuffix(_DELETED)
        if not path.startswith(self._roots):
            return None
        try:
            data = _read_memory(pid, address, min(count, WRITE_LIMIT))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                self._log_access_error(pid, error)
                return -errno.EIO
            return -errno.EFAULT
        except OverflowError:
            return -errno.EFAULT
        if not self._valid(notification):  # the pid may have been reused, and the data read from another process
            return -errno.EINTR
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
                if error.errno != errno.ENOENT:  # ENOENT: the writer was killed before the answer
                    raise

    def _log_access_error(self, pid: int, error: OSError) -> None:
        if not self._access_error_logged:
            self._access_error_logged = True
            log.error(
                "writes of a supervised process cannot be intercepted: it must be dumpable and run as the same user, "
                "and kernel.yama.ptrace_scope must be at most 1",
                extra={"fields": {"pid": pid, "why": os.strerror(error.errno or 0)}},
            )


def spawn(
    argv: Sequence[str], roots: Sequence[Path], handler: Handler, **popen: Any
) -> "tuple[subprocess.Popen[Any], Supervisor]":
    """Start a program whose writes beneath `roots` go to `handler`; further arguments are Popen's.

    Raises OSError as Popen does if the program cannot be started, InterceptionError if this system cannot intercept.
    The handler runs in the supervisor's thread: an answer that takes long must be a Future.
    """
    if os.uname().machine not in launch.MACHINES:
        raise InterceptionError(f"the simulated node cannot intercept writes on {os.uname().machine}: {_REQUIREMENTS}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            passed = (*popen.pop("pass_fds", ()), theirs.fileno())
            # The launcher needs only the standard library: -I -S makes its start faster.
            launcher = [sys.executable, "-I", "-S", launch.__file__, str(theirs.fileno()), "--", *argv]
            process = subprocess.Popen(launcher, pass_fds=passed, **popen)
        try:
            message, descriptors, _, _ = socket.recv_fds(ours, 64, 1)
            if not descriptors:
                raise InterceptionError(_not_supported(message))
            supervisor = Supervisor(descriptors[0], roots, handler)
        except BaseException:
            _end(process)
            raise
        failure = ours.recv(64)  # the stream ends when the program has started
    if failure:
        _end(process)
        supervisor.stop()
        number = int(failure.split()[1])
        raise OSError(number, os.strerror(number), argv[0])
    return process, supervisor


_REQUIREMENTS: Final = "it needs Linux 5.5 or newer with seccomp user notification, on x86_64 or aarch64"


def _not_supported(message: bytes) -> str:
    reason = ""
    with contextlib.suppress(IndexError, ValueError):
        reason = f" ({os.strerror(int(message.split()[1]))})"
    return (
        f"the simulated node cannot intercept writes on this system{reason}: {_REQUIREMENTS}, and no other supervisor"
    )


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
