"""Events with fields: the loggers that modules write to.

A module writes either of these, and both look the same:

    log = logging.getLogger(__name__)
    log.info("VF bound", extra={"fields": {"address": address}})

    log = logs.get(__name__)
    log.info("VF bound", address=address)
    log.v(3, "attribute read", name=name)        # at --v 3 or --vmodule discovery=3

The message is a constant sentence; everything that differs from event to event is in the fields.
"""

import logging

from qat_server.logs.settings import level_of


class EventLogger:
    """A standard library's logger whose methods take fields as keywords. Made by `get`."""

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def info(self, message: str, /, **fields: object) -> None:
        """A change of state that an operator wants to see."""
        if self._logger.isEnabledFor(logging.INFO):
            self._logger.info(message, extra={"fields": fields}, stacklevel=2)

    def warning(self, message: str, /, **fields: object) -> None:
        """Something is not as it should be, and the server goes on."""
        self._logger.warning(message, extra={"fields": fields}, stacklevel=2)

    def error(self, message: str, /, **fields: object) -> None:
        """Something that was asked for is not done."""
        self._logger.error(message, extra={"fields": fields}, stacklevel=2)

    def exception(self, message: str, /, **fields: object) -> None:
        """A defect: as `error`, with the traceback of the exception being handled."""
        self._logger.error(message, extra={"fields": fields}, stacklevel=2, exc_info=True)

    def v(self, verbosity: int, message: str, /, **fields: object) -> None:
        """Detail, written at --v `verbosity` and more."""
        level = level_of(verbosity)
        if self._logger.isEnabledFor(level):
            self._logger.log(level, message, extra={"fields": fields}, stacklevel=2)

    def enabled(self, verbosity: int) -> bool:
        """Whether `v` may write at all: ask before fields that cost something to make."""
        return self._logger.isEnabledFor(level_of(verbosity))


def get(name: str) -> EventLogger:
    """The logger of a module (`__name__`)."""
    return EventLogger(logging.getLogger(name))
