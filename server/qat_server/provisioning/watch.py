"""The provisioning configuration while the server runs: the last valid one, read again whenever its directory changes.

A ConfigMap's mount is replaced as a whole: ..data becomes a link to another directory, which the watch reports at once.
Where the directory cannot be watched (most systems allow 128 inotify instances per user), `load` at each resync detects
the change.
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

_COALESCE: Final = 0.02  # seconds; an editor writes a file in several steps


class ConfigurationWatch:
    """`current` is None until a valid configuration was read; `error` says why the present files are invalid, or "".

    `on_change` is called whenever either has changed.
    """

    def __init__(self, directory: Path, node_name: str | None, on_change: Callable[[], None]) -> None:
        self.current: Configuration | None = None
        self.error = ""
        self._directory = directory
        self._node_name = node_name
        self._on_change = on_change
        self._inotify: Inotify | None = None
        self._watch_error = ""
        self._pending: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Load the configuration now and after each change, until cancelled."""
        try:
            self._inotify = Inotify(self._load_soon, self._load_soon, self._load_soon)
        except OSError as error:
            self._report_unwatched(error)
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
        """Load the configuration now."""
        self._pending = None
        if self._inotify is not None:
            try:
                # Before reading, so that no change is missed. Each time, since the directory may be a new one.
                self._inotify.add(self._directory)
                self._watch_error = ""
            except OSError as error:
                self._report_unwatched(error)
        before = (self.current, self.error)
        try:
            loaded = configuration.load(self._directory, self._node_name)
        except ConfigurationError as error:
            if str(error) != self.error:
                so = "nothing is provisioned" if self.current is None else "the last valid configuration stays in force"
                log.error("provisioning configuration cannot be used", why=str(error), so=so)
            self.error = str(error)
        else:
            self.error = ""
            if loaded != self.current:
                log.info("provisioning configuration read", directory=self._directory, files=loaded.files)
            self.current = loaded
        if (self.current, self.error) != before:
            self._on_change()

    def _load_soon(self, _: Path) -> None:
        if self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(_COALESCE, self.load)

    def _report_unwatched(self, error: OSError) -> None:
        why = f"{error.filename}: {error.strerror}"
        if why != self._watch_error:
            log.warning("provisioning configuration is not watched: changes are detected at the next resync", why=why)
        self._watch_error = why
