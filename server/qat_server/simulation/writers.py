"""The programs that write to the emulated kernel, from `spawn` to `end`, and their writes: each in a thread of its own.

A write that waits holds up nobody else; one that goes wrong in an unforeseen way is a defect, and still gets an answer.
"""

import errno
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from qat_server.simulation import interception

log = logging.getLogger(__name__)


class Writers:
    """Writes beneath the first of `roots` go to `write` with their path in it; the other roots are of what was removed.

    `write` returns the number of bytes taken or raises OSError; what else it raises is put into `defects`.
    """

    def __init__(self, roots: Sequence[Path], write: Callable[[str, bytes], int], defects: list[str]) -> None:
        self._roots = tuple(roots)
        self._write = write
        self._defects = defects
        self._processes: list[tuple[subprocess.Popen[Any], interception.Supervisor]] = []
        self._threads: set[threading.Thread] = set()

    @property
    def idle(self) -> bool:
        """Whether no write is under way."""
        return not self._threads

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
        future: Future[int] = Future()
        thread = threading.Thread(
            target=self._serve, args=(relative, data, future), name=f"write {relative}", daemon=True
        )
        self._threads.add(thread)
        thread.start()
        return future

    def _serve(self, path: str, data: bytes, future: "Future[int]") -> None:
        try:
            result = self._write(path, data)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        except Exception as error:  # the outermost edge of this thread; the writer must get an answer
            log.exception("the emulated kernel failed in a write", extra={"fields": {"path": path}})
            self._defects.append(f"{path}: {error!r}")
            result = -errno.EIO
        future.set_result(result)
        self._threads.discard(threading.current_thread())

    def kill(self) -> None:
        """Kill the programs that still run."""
        for process, _ in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def end(self) -> None:
        """Return when all writes and all threads have ended. What waits must be woken before."""
        for thread in tuple(self._threads):
            thread.join()
        for _, supervisor in self._processes:
            supervisor.stop()
        self._processes.clear()
