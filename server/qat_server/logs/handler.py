"""The log handler of the process: klog's text or JSON, to standard error, to files or to both, as the flags say."""

import logging
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from typing import Final

from qat_server.logs.files import LogFiles
from qat_server.logs.formatters import JsonFormatter, TextFormatter
from qat_server.logs.logger import get
from qat_server.logs.settings import LogFormat, LogSettings, level_of, severity_of

OUR_LOGGERS: Final = ("qat_server", "qat_shared")


def configure(settings: LogSettings) -> logging.Handler:
    """Configure the logging of the process; replaces an earlier configuration. Raises OSError with the file's name.

    The flags that have no effect are logged in one line.
    """
    handler = _Handler(settings)
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if isinstance(each, _Handler)]:
        root.removeHandler(earlier)
        earlier.close()
    root.addHandler(handler)
    level = level_of(max(settings.verbosity, *(module for _, module in settings.modules), 0))
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(level)
    # INFO lines of libraries are about their internals, which only debugging needs.
    root.setLevel(level_of(settings.verbosity) if settings.verbosity >= 5 else logging.WARNING)
    logging.captureWarnings(True)  # one line through this handler instead of two on stderr
    if settings.ineffective:
        get(__name__).info(
            "flags accepted without effect",
            flags=settings.ineffective,
            hint="flags for log files need --logtostderr=false" if settings.to_stderr else "",
        )
    return handler


def module_threshold(settings: LogSettings) -> Callable[[str], int]:
    """The lowest level that is written, by source file (without .py). As in klog, --vmodule only adds to --v."""
    # Go negates a character class with ^, fnmatch with !.
    patterns = [(pattern.replace("[^", "[!"), verbosity) for pattern, verbosity in settings.modules]

    @cache
    def threshold(module: str) -> int:
        found = next((verbosity for pattern, verbosity in patterns if fnmatchcase(module, pattern)), 0)
        return level_of(max(settings.verbosity, found))

    return threshold


class _Handler(logging.Handler):
    """Formats each record once and writes the line to stderr, to files or to both."""

    def __init__(self, settings: LogSettings) -> None:
        super().__init__()
        self._settings = settings
        self._files = None if settings.to_stderr else LogFiles(settings)
        self._failed = False
        if settings.format is LogFormat.JSON:
            self.setFormatter(JsonFormatter())
        else:
            self.setFormatter(TextFormatter(headers=settings.headers, directory=settings.directory_in_header))
        if settings.modules:
            threshold = module_threshold(settings)
            self.addFilter(lambda record: record.levelno >= threshold(record.module))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
        except Exception:  # noqa: BLE001 - a field that cannot be formatted must not stop the caller
            self.handleError(record)
            return
        severity = severity_of(record.levelno)
        if self._files is None:
            if self._settings.legacy_stderr_threshold or severity >= self._settings.stderr_threshold:
                _to_stderr(line)
            return
        written = self._to_files(self._files, severity, line)
        if not written or self._also_to_stderr(severity):
            _to_stderr(line)

    def close(self) -> None:
        if self._files is not None:
            self._files.close()
        super().close()

    def _also_to_stderr(self, severity: int) -> bool:
        settings = self._settings
        if severity >= settings.stderr_threshold:
            return True
        return settings.also_to_stderr and severity >= settings.also_to_stderr_threshold

    def _to_files(self, files: LogFiles, severity: int, line: str) -> bool:
        try:
            files.write(severity, line.encode("utf-8", "backslashreplace"))
        except (OSError, ValueError) as error:  # ValueError: closed during a rotation
            if not self._failed:
                _to_stderr(f"qat-plugin: the log file cannot be written ({error}); lines go to standard error\n")
            self._failed = True
            return False
        self._failed = False
        return True


def _to_stderr(line: str) -> None:
    stream = sys.stderr
    try:
        stream.write(line)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        return  # nobody reads stderr, or it is closed (None); there is no other place to report that
