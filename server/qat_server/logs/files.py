"""Log files as klog writes them: one file (--log_file), or one for each severity in a directory (--log_dir).

In two cases this differs from klog. If a log file cannot be written, klog stops the process, and this server continues,
because a full disk must not take the node's devices away. klog truncates a full --log_file, and this server keeps it as
FILE.1 (one generation).
"""

import contextlib
import getpass
import os
import platform
import socket
import stat
import sys
import tempfile
import time
from io import FileIO
from typing import Final

from qat_server.logs.settings import SEVERITIES, LogFormat, LogSettings

PROGRAM: Final = "qat-plugin"
DIRECTORY_FILE_LIMIT: Final = 1800 * 2**20
"""Bytes after which a new file in --log_dir is opened (klog's MaxSize)."""


class LogFile:
    """One open log file. `limit` in bytes, 0 for none."""

    def __init__(self, path: str, limit: int, header: bytes, *, follow_link: bool) -> None:
        """Open for appending. Raises OSError. `follow_link`: `path` may be a symbolic link, since the user named it."""
        self.path = path
        self._limit = limit
        self._header = header
        self._follow_link = follow_link
        self._open()

    def _open(self, flags: int = 0) -> None:
        flags |= os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if self._follow_link else os.O_NOFOLLOW)
        self._file = FileIO(os.open(self.path, flags, 0o640), "a")
        status = os.fstat(self._file.fileno())
        self._regular = stat.S_ISREG(status.st_mode)  # /dev/stdout is not
        self._size = status.st_size if self._regular else 0
        if self._header:
            self._size += self._file.write(self._header)

    @property
    def full(self) -> bool:
        """Whether the limit has been reached."""
        return self._regular and 0 < self._limit <= self._size

    def write(self, line: bytes) -> None:
        """Append a line. Raises OSError."""
        self._size += self._file.write(line)

    def rotate(self) -> None:
        """Rename the file to PATH.1, replacing an earlier one, and continue with an empty file. Raises OSError."""
        self.close()
        try:
            os.rename(self.path, f"{self.path}.1")
            self._open()
        except OSError:  # the directory is not writable: truncate, as klog does
            self._open(os.O_TRUNC)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()


class LogFiles:
    """All log files of the process. The constructor raises OSError when they cannot be created."""

    def __init__(self, settings: LogSettings) -> None:
        self._settings = settings
        self._single: LogFile | None = None
        self._by_severity: dict[int, LogFile] = {}
        if settings.file:
            self._single = LogFile(settings.file, settings.file_max_size, self._header(), follow_link=True)
        else:
            self._file(0)

    def write(self, severity: int, line: bytes) -> None:
        """Write a line to the file of its severity and to all lower ones (--one_output: only its own).

        Raises OSError.
        """
        if self._single is not None:
            if self._single.full:
                self._single.rotate()
            self._single.write(line)
            return
        lowest = severity if self._settings.one_output else 0
        for each in range(severity, lowest - 1, -1):
            self._file(each).write(line)

    def close(self) -> None:
        """Close all files."""
        for file in (*self._by_severity.values(), *((self._single,) if self._single else ())):
            file.close()

    def _file(self, severity: int) -> LogFile:
        file = self._by_severity.get(severity)
        if file is not None and not file.full:
            return file
        if file is not None:
            file.close()
        directory = self._settings.directory or tempfile.gettempdir()
        tag = SEVERITIES[severity]
        name = f"{PROGRAM}.{_host()}.{_user()}.log.{tag}.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}"
        path = os.path.join(directory, name)
        if file is not None and file.path == path:  # full within a second of being opened
            path += ".1"
        opened = LogFile(path, DIRECTORY_FILE_LIMIT, self._header(), follow_link=False)
        self._by_severity[severity] = opened
        link = os.path.join(directory, f"{PROGRAM}.{tag}")
        with contextlib.suppress(OSError):  # the link is only a convenience, as with klog
            if os.path.islink(link):
                os.unlink(link)
            os.symlink(os.path.basename(path), link)
        return opened

    def _header(self) -> bytes:
        if not self._settings.file_headers or self._settings.format is LogFormat.JSON:
            return b""
        lines = (
            f"Log file created at: {time.strftime('%Y/%m/%d %H:%M:%S')}",
            f"Running on machine: {_host()}",
            f"Binary: Built with CPython {platform.python_version()} for {sys.platform}/{os.uname().machine}",
            "Log line format: [IWEF]mmdd hh:mm:ss.uuuuuu threadid file:line] msg",
        )
        return "".join(f"{line}\n" for line in lines).encode()


def _host() -> str:
    return socket.gethostname().partition(".")[0] or "unknownhost"


def _user() -> str:
    try:
        return getpass.getuser().replace(os.sep, "_")
    except (KeyError, OSError):  # a container's uid has no name
        return f"uid{os.getuid()}"
