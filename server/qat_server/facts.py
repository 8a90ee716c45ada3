"""What is not as it should be, said once for as long as it stays so."""

from qat_server import logs

log = logs.get(__name__)


class Facts:
    """Found again by each look at the devices."""

    def __init__(self) -> None:
        self._before: set[tuple[str, str]] = set()
        self._now: set[tuple[str, str]] = set()

    def say(self, message: str, /, **fields: object) -> None:
        """Log a warning, unless it was said already and has been found by every look since."""
        key = (message, repr(fields))
        if key not in self._before and key not in self._now:
            log.warning(message, **fields)
        self._now.add(key)

    def settle(self) -> None:
        """A look has ended: what it has not found is over."""
        self._before, self._now = self._now, set()
