"""Log files as klog makes them: one file (--log_file), or one for each severity in a directory (--log_dir).

Where klog stops the process because a log file cannot be written, or empties a full --log_file, we go on and keep the
last full one as FILE.1: a full disk must not take the node's devices away.
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
"""Bytes after which a file in --log_dir is followed by another (klog's MaxSize)."""


class LogFile:
    """One open log file. `limit` in bytes, 0 for none."""

    def __init__(self, path: str, limit: int, header: bytes, *, ours: bool) -> None:
        """Open for appending. Raises OSError. `ours`: we chose the name, so a link in its place is not followed."""
        self.path = path
        self._limit = limit
        self._header = header
        self._ours = ours
        self._open()

    def _open(self, flags: int = 0) -> None:
        flags |= os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_NOFOLLOW if self._ours else 0)
        self._file = FileIO(os.open(self.path, flags, 0o640), "a")
        status = os.fstat(self._file.fileno())
        self._regular = stat.S_ISREG(status.st_mode)  # /dev/stdout is not
        self._size = status.st_size if self._regular else 0
        if self._header:
            self._size += self._file.write(self._header)

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._regular and 0 < self._limit <= self._size

    def write(self, line: bytes) -> None:
        """Raises OSError."""
        self._size += self._file.write(line)

    def begin_anew(self) -> None:
        """Keep what there is as PATH.1 (in place of the last) and go on with an empty file. Raises OSError."""
        self.close()
        try:
            os.rename(self.path, f"{self.path}.1")
            self._open()
        except OSError:  # the directory is not ours to write: what klog does
            self._open(os.O_TRUNC)

    def close(self) -> None:
        """Close it."""
        with contextlib.suppress(OSError):
            self._file.close()


class LogFiles:
    """All files of a process. Raises OSError from the start when they cannot be made."""

    def __init__(self, settings: LogSettings) -> None:
        self._settings = settings
        self._single: LogFile | None = None
        self._by_severity: dict[int, LogFile] = {}
        if settings.file:
            self._single = LogFile(settings.file, settings.file_max_size, self._header(), ours=False)
        else:
            self._of(0)

    def write(self, severity: int, line: bytes) -> None:
        """Write a line where its severity belongs: to its own file and all less severe ones. Raises OSError."""
        if self._single is not None:
            if self._single.full:
                self._single.begin_anew()
            self._single.write(line)
            return
        lowest = severity if self._settings.one_output else 0
        for each in range(severity, lowest - 1, -1):
            self._of(each).write(line)

    def close(self) -> None:
        """Close all."""
        for file in (*self._by_severity.values(), *((self._single,) if self._single else ())):
            file.close()

    def _of(self, severity: int) -> LogFile:
        file = self._by_severity.get(severity)
        if file is not None and not file.full:
            return file
        if file is not None:
            file.close()
        directory = self._settings.directory or tempfile.gettempdir()
        tag = SEVERITIES[severity]
        name = f"{PROGRAM}.{_host()}.{_user()}.log.{tag}.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}"
        path = os.path.join(directory, name)
        if file is not None and file.path == path:  # full within a second of its beginning
            path += ".1"
        opened = LogFile(path, DIRECTORY_FILE_LIMIT, self._header(), ours=True)
        self._by_severity[severity] = opened
        link = os.path.join(directory, f"{PROGRAM}.{tag}")
        with contextlib.suppress(OSError):  # a convenience, as with klog
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
