"""The programs that write to the emulated kernel, from `spawn` to `end`, and their writes: a thread for each of them.

A write that waits holds up nobody else; one that goes wrong in an unforeseen way is a defect, and still gets an answer.
"""

import errno
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from qat_simulation.interception import supervisor as interception

log = logging.getLogger(__name__)

AT_ONCE: Final = 1024
"""Writes that may be under way at a time: more than any program makes. Their threads are made as they are needed."""


class Writers:
    """Writes beneath the first of `roots` go to `write` with their path in it; the other roots are of what was removed.

    `write` returns the number of bytes taken or raises OSError; what else it raises is put into `defects`.
    """

    def __init__(self, roots: Sequence[Path], write: Callable[[str, bytes], int], defects: list[str]) -> None:
        self._roots = tuple(roots)
        self._write = write
        self._defects = defects
        self._processes: list[tuple[subprocess.Popen[Any], interception.Supervisor]] = []
        self._threads = ThreadPoolExecutor(AT_ONCE, "write")
        self._under_way: set[Future[int]] = set()

    @property
    def idle(self) -> bool:
        """Whether no write is under way."""
        return not self._under_way

    @property
    def gone(self) -> bool:
        """Whether all programs and their children have ended."""
        return all(supervisor.ended for _, supervisor in self._processes)

    def spawn(self, argv: Sequence[str], **popen: Any) -> "subprocess.Popen[Any]":
        """Start a program; further arguments are Popen's. Raises OSError, InterceptionError."""
        process, supervisor = interception.spawn(argv, self._roots, self.answer, **popen)
        self._processes = [known for known in self._processes if known[0].returncode is None or not known[1].ended]
        self._processes.append((process, supervisor))
        return process

    def answer(self, path: str, data: bytes) -> "int | Future[int]":
        """Answer one write, as a handler of interception.py does."""
        relative = os.path.relpath(path, self._roots[0])
        if relative.startswith(".."):  # a file of a device that was removed while the writer had it open
            return -errno.ENODEV
        try:
            future = self._threads.submit(self._serve, relative, data)
        except RuntimeError:  # this kernel has ended
            return -errno.ESHUTDOWN
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
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
        """Return when all writes and all threads have ended. What waits must be woken before."""
        self._threads.shutdown()
        for _, supervisor in self._processes:
            supervisor.stop()
        self._processes.clear()
