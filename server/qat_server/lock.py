"""One server works at a time: an advisory lock in the socket directory, which the kernel drops when its holder ends."""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from qat_server import logs

log = logs.get(__name__)

_NAME: Final = ".server.lock"
_RETRY: Final = 0.1  # seconds; a rolling update hands over within this


@asynccontextmanager
async def only_server(directory: Path) -> AsyncIterator[None]:
    """Wait until no other server holds the directory's lock, then hold it. Raises OSError when it cannot be made."""
    descriptor = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
    try:
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    log.info("another server works here: waiting for its end", lock=str(directory / _NAME))
                told = True
                await asyncio.sleep(_RETRY)
        yield
    finally:
        os.close(descriptor)
