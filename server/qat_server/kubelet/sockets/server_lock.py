"""One server works at a time: advisory locks, which the kernel drops when their holder ends.

One is on the directory of the endpoints' sockets. It is another directory for each way to register, so when a rolling
update changes --registration this lock would not be enough: the other one is on a directory that is the node's
whatever the settings, that of the helper's socket. Both are on the directories themselves (whoever can read one can
lock it): a file in them would be one user's, and in the way of a server that runs as another later on.
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
async def only_server(
    directory: Path, node_directory: Path | None = None, on_wait: Callable[[Path], None] = lambda _: None
) -> AsyncIterator[int]:
    """Wait until no other server holds the locks, then hold them. Yields `directory`'s descriptor.

    `on_wait` is called with what is waited for. Raises OSError when `directory` cannot be read; a `node_directory` that
    cannot be read is done without.
    """
    with contextlib.ExitStack() as stack:
        if node_directory is not None:
            with contextlib.suppress(OSError):
                node = _opened(node_directory, stack)
                # Two locks on one directory: the second would wait for the first.
                if not os.path.samestat(os.fstat(node), os.stat(directory)):
                    await _locked(node, node_directory, on_wait)
        descriptor = _opened(directory, stack)
        await _locked(descriptor, directory, on_wait)
        yield descriptor


def _opened(directory: Path, stack: contextlib.ExitStack) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


async def _locked(descriptor: int, path: Path, on_wait: Callable[[Path], None]) -> None:
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                log.info("another server works here: waiting for its end", lock=str(path))
                on_wait(path)
            told = True
            await asyncio.sleep(_RETRY)
        else:
            return
