"""Loggers for events with fields.

A module can use either form, and both give the same line:

    log = logging.getLogger(__name__)
    log.info("VF bound", extra={"fields": {"address": address}})

    log = logs.get(__name__)
    log.info("VF bound", address=address)
    log.v(3, "attribute read", name=name)        # at --v 3 or --vmodule discovery=3

The message is a constant sentence. Everything that differs between events is in the fields.
"""

import logging

from qat_server.logs.settings import level_of


class EventLogger:
    """A logger of the standard library whose methods take fields as keywords. Created by `get`."""

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def info(self, message: str, /, **fields: object) -> None:
        """Log a change of state that an operator wants to see."""
        if self._logger.isEnabledFor(logging.INFO):
            self._logger.info(message, extra={"fields": fields}, stacklevel=2)

    def warning(self, message: str, /, **fields: object) -> None:
        """Log a condition that needs attention but does not stop the server."""
        self._logger.warning(message, extra={"fields": fields}, stacklevel=2)

    def error(self, message: str, /, **fields: object) -> None:
        """Log an operation that failed."""
        self._logger.error(message, extra={"fields": fields}, stacklevel=2)

    def exception(self, message: str, /, **fields: object) -> None:
        """Log a defect: as `error`, with the traceback of the exception being handled."""
        self._logger.error(message, extra={"fields": fields}, stacklevel=2, exc_info=True)

    def v(self, verbosity: int, message: str, /, **fields: object) -> None:
        """Log a detail, which is written if --v is at least `verbosity`."""
        level = level_of(verbosity)
        if self._logger.isEnabledFor(level):
            self._logger.log(level, message, extra={"fields": fields}, stacklevel=2)


def get(name: str) -> EventLogger:
    """The logger of a module (`__name__`)."""
    return EventLogger(logging.getLogger(name))
