"""The running programs whose writes are intercepted, from `spawn` to `end`, with a thread for each write.

A write that waits blocks no other. An unexpected error in a write is recorded as a defect, and the writer gets EIO.
"""

import errno
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from qat_simulation.interception.supervisor import Supervisor, spawn

log = logging.getLogger(__name__)

MAX_CONCURRENT_WRITES: Final = 1024
"""More than any program makes. Threads are started only when they are needed."""


class Programs:
    """Writes beneath the first of `roots` go to `write`, with the path relative to it; removed files are in the others.

    `write` returns the number of bytes accepted, or raises OSError. Any other exception is appended to `defects`.
    """

    def __init__(self, roots: Sequence[Path], write: Callable[[str, bytes], int], defects: list[str]) -> None:
        self._roots = tuple(roots)
        self._write = write
        self._defects = defects
        self._processes: list[tuple[subprocess.Popen[Any], Supervisor]] = []
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT_WRITES, "write")
        self._pending: set[Future[int]] = set()

    @property
    def idle(self) -> bool:
        """Whether no write is pending."""
        return not self._pending

    @property
    def ended(self) -> bool:
        """Whether all programs and their children have ended."""
        return all(supervisor.ended for _, supervisor in self._processes)

    def spawn(self, argv: Sequence[str], **popen: Any) -> "subprocess.Popen[Any]":
        """Start a program; further arguments are Popen's. Raises OSError, InterceptionError."""
        process, supervisor = spawn(argv, self._roots, self.answer, **popen)
        self._processes = [known for known in self._processes if known[0].returncode is None or not known[1].ended]
        self._processes.append((process, supervisor))
        return process

    def answer(self, path: str, data: bytes) -> "int | Future[int]":
        """Answer one write; a `Handler` of supervisor.py."""
        relative = os.path.relpath(path, self._roots[0])
        if relative.startswith(".."):  # the file of a device that was removed while the writer had it open
            return -errno.ENODEV
        try:
            future = self._threads.submit(self._serve, relative, data)
        except RuntimeError:  # `end` was called
            return -errno.ESHUTDOWN
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def _serve(self, path: str, data: bytes) -> int:
        try:
            return self._write(path, data)
        except OSError as error:
            return -(error.errno or errno.EIO)
        except Exception as error:  # the outermost edge of this thread; the writer must get an answer
            log.exception("the emulated kernel failed in a write", extra={"fields": {"path": path}})
            self._defects.append(f"{path}: {error!r}")
            return -errno.EIO

    def kill(self) -> None:
        """Kill the programs that still run."""
        for process, _ in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def end(self) -> None:
        """Return when all writes and threads have ended. The caller wakes waiting writes first."""
        self._threads.shutdown()
        for _, supervisor in self._processes:
            supervisor.stop()
        self._processes.clear()
