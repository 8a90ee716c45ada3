"""Trace every write(2) of a helper and its children before it happens. The path comes from the kernel, not the helper.

The emulated kernel handles the writes beneath its tree; writes into the other watched directories happen unchanged.
The tracing is the emulated kernel's own interception (qat_simulation.interception): the helper is unmodified.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from qat_simulation.interception import supervisor as interception
from qat_simulation.kernel.kernel import Kernel

Write = tuple[str, bytes]


class Writes:
    """All writes in order, in `seen`.

    `refuse` is called before each write; if it returns True, the write fails with EIO. `made` is called when the
    emulated kernel has performed a write, before the writer knows.
    """

    def __init__(self, kernel: Kernel, *folders: Path) -> None:
        self.seen: list[Write] = []
        self.refuse: Callable[[Write], bool] = lambda write: False
        self.made: Callable[[Write], None] = lambda write: None
        self._kernel = kernel
        self._folders = folders
        self._roots = tuple(f"{root}/" for root in kernel.roots)
        self._supervisors: list[interception.Supervisor] = []

    def spawn(self, argv: Sequence[str], **popen: Any) -> "subprocess.Popen[bytes]":
        """Start a program; the arguments are those of Popen."""
        process, supervisor = interception.spawn(argv, (*self._kernel.roots, *self._folders), self._answer, **popen)
        self._supervisors.append(supervisor)
        return process

    def close(self) -> None:
        """Wait until everything that was started has exited."""
        for supervisor in self._supervisors:
            supervisor.stop()

    def _answer(self, path: str, data: bytes) -> "int | Future[int] | None":
        write = (path, data)
        self.seen.append(write)
        if self.refuse(write):
            return -5
        if not path.startswith(self._roots):
            return None
        answer = self._kernel.intercepted(path, data)
        if isinstance(answer, Future):
            answer.add_done_callback(lambda _: self.made(write))
        return answer


class Killer:
    """Kills a helper, with its children if `all_of_it`, before its `at`-th write that names `address`."""

    def __init__(self, process: "subprocess.Popen[bytes]", address: str, at: int, *, all_of_it: bool) -> None:
        self.struck = threading.Event()
        self.pid = process.pid
        self._address = address.encode()
        self._left = at
        self._all_of_it = all_of_it

    def __call__(self, write: Write) -> bool:
        path, data = write
        if self.struck.is_set() or (self._address not in data and self._address.decode() not in path):
            return False
        self._left -= 1
        if self._left:
            return False
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        os.kill(self.pid, signal.SIGKILL)  # first, so that it does not see its children exit
        for child in children if self._all_of_it else ():
            os.kill(int(child), signal.SIGKILL)
        self.struck.set()
        return self._all_of_it or path.endswith(".jsonl")
