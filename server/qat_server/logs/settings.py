"""The logging settings, whose meaning is klog's, and the mapping of verbosity to the standard library's levels.

klog     info  V(1) .. V(4)  V(5)=debug  V(6) ..
logging  20    19   .. 16    10          9   ..
"""

import logging
import os
import tempfile
from enum import StrEnum
from typing import Final

from msgspec import Struct

SEVERITIES: Final = ("INFO", "WARNING", "ERROR", "FATAL")


class LogFormat(StrEnum):
    """The format of log lines."""

    TEXT = "text"
    JSON = "json"


class LogSettings(Struct, frozen=True, kw_only=True):
    """Where log lines go, and their format. Severities: 0 info, 1 warning, 2 error, 3 fatal; `file_max_size` in bytes.

    `ineffective` are the given flags that have no effect; they are logged once.
    """

    verbosity: int = 0
    modules: tuple[tuple[str, int], ...] = ()
    format: LogFormat = LogFormat.TEXT
    to_stderr: bool = True
    also_to_stderr: bool = False
    stderr_threshold: int = 2
    also_to_stderr_threshold: int = 0
    legacy_stderr_threshold: bool = True
    directory: str = ""
    file: str = ""
    file_max_size: int = 0
    one_output: bool = False
    directory_in_header: bool = False
    headers: bool = True
    file_headers: bool = True
    ineffective: tuple[str, ...] = ()

    @property
    def file_directory(self) -> str | None:
        """The directory that log files are written to; None if there are no log files."""
        if self.to_stderr:
            return None
        directory = os.path.dirname(os.path.abspath(self.file)) if self.file else self.directory
        return directory or tempfile.gettempdir()


_DEBUG_VERBOSITY: Final = 5


def level_of(verbosity: int) -> int:
    """The standard library's level of V(verbosity): 20 for 0 and less, and never below 1."""
    if verbosity <= 0:
        return logging.INFO
    if verbosity < _DEBUG_VERBOSITY:
        return logging.INFO - verbosity
    return max(1, logging.DEBUG - (verbosity - _DEBUG_VERBOSITY))


def verbosity_of(level: int) -> int:
    """The inverse of `level_of`: 0 for info and every more severe level."""
    if level >= logging.INFO:
        return 0
    if level > logging.INFO - _DEBUG_VERBOSITY:
        return logging.INFO - level
    return max(_DEBUG_VERBOSITY, _DEBUG_VERBOSITY + logging.DEBUG - level)


def severity_of(level: int) -> int:
    """0 info (and all V levels), 1 warning, 2 error, 3 fatal."""
    if level < logging.WARNING:
        return 0
    return min(3, (level - logging.INFO) // 10)
