"""The provisioning configuration while the server runs: the last good one, read anew whenever its directory changes.

A ConfigMap's mount is replaced as a whole: ..data becomes a link to another directory, which its watch tells at once.
Where nothing can be watched (a user has 128 such watches), `load` at each resync finds the change.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qat_server import logs
from qat_server.provisioning import configuration
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.inotify import Inotify
from qat_server.provisioning.qat_conf import ConfigurationError

log = logs.get(__name__)

_COALESCE: Final = 0.02  # seconds: an editor writes a file in several steps


class ConfigurationWatch:
    """`current` is None until there has been a good one; `error` says what is wrong with the files as they are now.

    `on_change` is called whenever either has changed.
    """

    def __init__(self, directory: Path, node_name: str | None, on_change: Callable[[], None]) -> None:
        self.current: Configuration | None = None
        self.error = ""
        self._directory = directory
        self._node_name = node_name
        self._on_change = on_change
        self._inotify: Inotify | None = None
        self._unwatched = ""
        self._pending: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Read it, and again at each change, until cancelled."""
        try:
            self._inotify = Inotify(self._soon, self._soon, self._soon)
        except OSError as error:
            self._not_watched(error)
        try:
            self.load()
            await asyncio.get_running_loop().create_future()
        finally:
            if self._pending is not None:
                self._pending.cancel()
            if self._inotify is not None:
                self._inotify.close()
                self._inotify = None

    def load(self) -> None:
        """Read it now."""
        self._pending = None
        if self._inotify is not None:
            try:
                self._inotify.add(self._directory)  # first, so that no change is missed; again, if it was made anew
                self._unwatched = ""
            except OSError as error:
                self._not_watched(error)
        before = (self.current, self.error)
        try:
            found = configuration.load(self._directory, self._node_name)
        except ConfigurationError as error:
            if str(error) != self.error:
                kept = "nothing is provisioned" if self.current is None else "the last good one stays in force"
                log.error("provisioning configuration not usable", why=str(error), so=kept)
            self.error = str(error)
        else:
            self.error = ""
            if found != self.current:
                log.info("provisioning configuration read", directory=self._directory, files=found.files)
            self.current = found
        if (self.current, self.error) != before:
            self._on_change()

    def _soon(self, _: Path) -> None:
        if self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(_COALESCE, self.load)

    def _not_watched(self, error: OSError) -> None:
        why = f"{error.filename}: {error.strerror}"
        if why != self._unwatched:
            log.warning("configuration is not watched: changes are seen at the next resync", why=why)
        self._unwatched = why
