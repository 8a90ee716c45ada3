"""Conditions that are logged once while they last."""

from qat_server import logs

log = logs.get(__name__)


class Conditions:
    """The conditions of the current reconcile, compared with those of the one before."""

    def __init__(self) -> None:
        self._before: set[tuple[str, str]] = set()
        self._now: set[tuple[str, str]] = set()

    def report(self, message: str, /, **fields: object) -> None:
        """Log a warning when the condition begins; not again while each reconcile reports it."""
        key = (message, repr(fields))
        if key not in self._before and key not in self._now:
            log.warning(message, **fields)
        self._now.add(key)

    def settle(self) -> None:
        """End a reconcile: a condition that it did not report is over."""
        self._before, self._now = self._now, set()
