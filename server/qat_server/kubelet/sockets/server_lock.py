"""Advisory locks that let only one server run on a node; the kernel releases them when their holder exits.

One lock is on the directory of the endpoints' sockets. That directory depends on --registration, so this lock alone is
not enough when a rolling update changes the flag. The second lock is on the directory of the helper's socket, which
does not depend on --registration. Both locks are on the directories themselves, which any process that can read
them can lock. A lock file would belong to one user, and would block a server that later runs as another.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from qat_server import logs

log = logs.get(__name__)

_RETRY: Final = 0.1  # seconds; a rolling update hands over within this


@asynccontextmanager
async def server_lock(
    directory: Path, node_directory: Path | None = None, on_wait: Callable[[Path], None] = lambda _: None
) -> AsyncIterator[int]:
    """Wait until no other server holds the locks, then hold them. Yields `directory`'s descriptor.

    `on_wait` is called with the path of a lock that another server holds. Raises OSError if `directory` cannot be
    read. If `node_directory` cannot be read, that lock is skipped.
    """
    with contextlib.ExitStack() as stack:
        if node_directory is not None:
            with contextlib.suppress(OSError):
                node = _open(node_directory, stack)
                # Two locks on one directory: the second would wait for the first.
                if not os.path.samestat(os.fstat(node), os.stat(directory)):
                    await _lock(node, node_directory, on_wait)
        descriptor = _open(directory, stack)
        await _lock(descriptor, directory, on_wait)
        yield descriptor


def _open(directory: Path, stack: contextlib.ExitStack) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


async def _lock(descriptor: int, path: Path, on_wait: Callable[[Path], None]) -> None:
    waiting = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                log.info("another server is running: waiting for it to exit", lock=str(path))
                on_wait(path)
            waiting = True
            await asyncio.sleep(_RETRY)
        else:
            return
