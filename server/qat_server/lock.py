"""One server works at a time: advisory locks, which the kernel drops when their holder ends.

One is in the directory of the endpoints' sockets. It is another directory for each way to register, so when a rolling
update changes --registration this lock would not be enough: the other one is on a directory that is the node's
whatever the settings, that of the helper's socket. Nothing is written there (it is root's): a directory that can be
read can be locked.
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

NAME: Final = ".server.lock"
_RETRY: Final = 0.1  # seconds; a rolling update hands over within this


@asynccontextmanager
async def only_server(
    directory: Path, node_directory: Path | None = None, on_wait: Callable[[Path], None] = lambda _: None
) -> AsyncIterator[int]:
    """Wait until no other server holds the locks, then hold them. Yields the descriptor of `directory`'s lock file.

    `on_wait` is called with what is waited for. Raises OSError when the file in `directory` cannot be made; a
    `node_directory` that cannot be read is done without.
    """
    with contextlib.ExitStack() as stack:
        if node_directory is not None:
            with contextlib.suppress(OSError):
                node = os.open(node_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, node)
                await _locked(node, node_directory, on_wait)
        path = directory / NAME
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
        stack.callback(os.close, file)
        await _locked(file, path, on_wait)
        yield file


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
