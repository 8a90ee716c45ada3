"""The directory of the endpoints' sockets: the helper prepares it, one server at a time works in it, and it may go.

Without a helper, or when the helper refuses (its policy, or an audit log that cannot be written), a directory that is
there and can be written to does as well. When the directory goes under a server that works (somebody removed the
kubelet's), `held` ends with DirectoryGoneError: then prepare it and hold it again.
"""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from qat_server import logs
from qat_server.helper_client.client import HelperClient, HelperError, HelperUnavailableError
from qat_server.kubelet.sockets.server_lock import only_server
from qat_shared.messages import SocketDirectory

log = logs.get(__name__)

PATIENCE: Final = 2.0
"""Seconds that a helper has to prepare a directory that could be used as it is."""
_RETRY: Final = 1.0


class DirectoryUnusableError(OSError):
    """The server cannot work there: one sentence that says what to do."""


class DirectoryGoneError(Exception):
    """The directory that the server worked in is not there any more."""


class EndpointDirectory:
    """`path`, which the helper knows as `directory`. `waits_for`: why the server cannot use it yet, "" when it can."""

    def __init__(self, helper: HelperClient, directory: SocketDirectory, path: Path, node_directory: Path) -> None:
        self._helper = helper
        self._directory = directory
        self.path = path
        self._node_directory = node_directory
        self._helper_event = asyncio.Event()
        self._missed = asyncio.Event()
        self._lock = -1
        self._said = ""
        self.waits_for = ""

    def helper_changed(self) -> None:
        """The helper came or went."""
        self._helper_event.set()

    def missed(self) -> None:
        """Somebody could not find it: `until_gone` is to look."""
        self._missed.set()

    async def prepare(self) -> None:
        """Return when it can be used, as far as the helper can tell, or this process."""
        while True:
            self._helper_event.clear()
            try:
                async with asyncio.timeout(PATIENCE if self._usable() else None):
                    await self._helper.prepare_socket_directory(self._directory)
            except HelperUnavailableError as error:
                if self._usable():
                    return
                self.waits_for = f"{self.path} waits for the helper, which prepares it: {error.message}"
                await self._helper_event.wait()
            except (HelperError, TimeoutError) as error:
                why = str(error) or f"the helper did not answer within {PATIENCE:g} s"
                if self._usable():
                    self._say("socket directory used as it is, since the helper did not prepare it", why)
                    return
                self.waits_for = f"the helper could not prepare {self.path}: {why}"
                self._say("socket directory not prepared", why)
                await asyncio.sleep(_RETRY)
            else:
                return

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """As the only server that works, after any other has ended. Raises DirectoryUnusableError."""
        async with AsyncExitStack() as stack:
            try:
                one = only_server(self.path, self._node_directory, self._wait)
                self._lock = await stack.enter_async_context(one)
            except OSError as error:
                raise self._unusable(error.errno or 0) from error
            if not self._usable():
                raise self._unusable(errno.EACCES)
            self.waits_for = ""
            self._missed.clear()
            yield

    async def until_gone(self) -> None:
        """While held: raises DirectoryGoneError once somebody has missed it, and it has indeed gone."""
        while True:
            await self._missed.wait()
            self._missed.clear()
            if not self._there():
                log.warning("the socket directory has gone: beginning anew", directory=str(self.path))
                raise DirectoryGoneError

    def _wait(self, lock: Path) -> None:
        self.waits_for = f"another server works here: waiting for its end ({lock})"

    def _there(self) -> bool:
        """Whether the path still leads to the directory that is locked."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        held = os.fstat(self._lock)
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

    def _usable(self) -> bool:
        return os.access(self.path, os.W_OK | os.X_OK)

    def _unusable(self, number: int) -> DirectoryUnusableError:
        there = number not in (errno.ENOENT, errno.ENOTDIR)
        what = f"is not open to this server ({os.strerror(number)})" if there else "is not there"
        tree = "/".join(self.path.parts[-2:])
        return DirectoryUnusableError(
            f"{self.path} {what}: mount the kubelet's {tree} there, which the helper makes for this server's group,"
            " or give the kubelet's directory with --kubelet-dir; if it was made anew, start helper and server again"
        )

    def _say(self, message: str, why: str) -> None:
        if why != self._said:
            log.warning(message, directory=str(self.path), why=why)
        self._said = why
