"""The directory of the endpoints' sockets: prepared by the helper, used by one server at a time, watched for removal.

The server can also use a directory that exists and is writable without the helper, or when the helper refuses to
prepare it (by policy, or because the audit log cannot be written). If the directory is removed while the server uses
it (with the kubelet's directory), `watch` raises DirectoryGoneError: prepare and lock it again.
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
from qat_server.kubelet.sockets.server_lock import server_lock
from qat_shared.messages import SocketDirectory

log = logs.get(__name__)

PREPARE_TIMEOUT: Final = 2.0
"""Seconds that the helper has to prepare a directory that is usable without it."""
_RETRY: Final = 1.0


class DirectoryUnusableError(OSError):
    """The server cannot use the directory; the message is one sentence that says how to fix it."""


class DirectoryGoneError(Exception):
    """The directory was removed while the server used it."""


class EndpointDirectory:
    """The directory at `path`, which the helper's protocol names `directory`.

    `node_directory` has the same path whatever the settings, see server_lock. `waits_for`: why the server cannot use
    the directory yet, "" when it can.
    """

    def __init__(self, helper: HelperClient, directory: SocketDirectory, path: Path, node_directory: Path) -> None:
        self._helper = helper
        self._directory = directory
        self.path = path
        self._node_directory = node_directory
        self._helper_event = asyncio.Event()
        self._check = asyncio.Event()
        self._lock = -1
        self._last_warning = ""
        self.waits_for = ""

    def helper_changed(self) -> None:
        """Wake `prepare` if it waits for a helper. Without effect while the directory is in use."""
        self._helper_event.set()

    def report_missing(self) -> None:
        """Let `watch` check whether the directory still exists."""
        self._check.set()

    async def prepare(self) -> None:
        """Return when the helper has prepared the directory, or when this process can use it as it is."""
        while True:
            self._helper_event.clear()
            try:
                async with asyncio.timeout(PREPARE_TIMEOUT if self._usable() else None):
                    await self._helper.prepare_socket_directory(self._directory)
            except HelperUnavailableError as error:
                if self._usable():
                    return
                self.waits_for = f"waiting for the helper to prepare {self.path}: {error.message}"
                await self._helper_event.wait()
            except (HelperError, TimeoutError) as error:
                why = str(error) or f"the helper did not answer within {PREPARE_TIMEOUT:g} s"
                if self._usable():
                    self._warn("socket directory used as it is, since the helper did not prepare it", why)
                    return
                self.waits_for = f"the helper could not prepare {self.path}: {why}"
                self._warn("socket directory not prepared", why)
                await asyncio.sleep(_RETRY)
            else:
                return

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold the directory as the only server, once any other has exited. Raises DirectoryUnusableError."""
        async with AsyncExitStack() as stack:
            try:
                lock = server_lock(self.path, self._node_directory, self._report_wait)
                self._lock = await stack.enter_async_context(lock)
            except OSError as error:
                raise self._unusable(error.errno or 0) from error
            if not self._usable():
                raise self._unusable(errno.EACCES)
            self.waits_for = ""
            self._check.clear()
            yield

    async def watch(self) -> None:
        """While locked: raise DirectoryGoneError when the directory is reported missing and has been removed."""
        while True:
            await self._check.wait()
            self._check.clear()
            if not self._exists():
                log.warning("socket directory was removed: starting again", directory=str(self.path))
                raise DirectoryGoneError

    def _report_wait(self, lock: Path) -> None:
        self.waits_for = f"another server is running: waiting for it to exit ({lock})"

    def _exists(self) -> bool:
        """Whether the path still leads to the directory that is locked."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._lock))

    def _usable(self) -> bool:
        return os.access(self.path, os.W_OK | os.X_OK)

    def _unusable(self, number: int) -> DirectoryUnusableError:
        missing = number in (errno.ENOENT, errno.ENOTDIR)
        problem = "does not exist" if missing else f"is not accessible to this server ({os.strerror(number)})"
        tree = "/".join(self.path.parts[-2:])
        return DirectoryUnusableError(
            f"{self.path} {problem}: mount the kubelet's {tree} there, which the helper creates for this server's"
            " group, or set --kubelet-dir; if the directory was recreated, restart the helper and the server"
        )

    def _warn(self, message: str, why: str) -> None:
        if why != self._last_warning:
            log.warning(message, directory=str(self.path), why=why)
        self._last_warning = why
