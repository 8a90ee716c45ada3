"""The sysfs tree on disk: plain files, directories and links. Readers see each change completely or not at all.

Files and directories are made in a staging directory and renamed into the tree, so that no reader finds an incomplete
one or a temporary name. Paths are relative to the sysfs root. Nothing is decided here.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

Entry = tuple[str, str, int]
"""A file: its path, its text, its mode."""

_EMPTY_PARENT = frozenset({"", "."})


class Tree:
    """`root` is the sysfs root, `staging` the directory for files on their way into the tree or out of it."""

    def __init__(self, root: Path, staging: Path) -> None:
        self.root = root
        self.staging = staging
        root.mkdir(parents=True)
        staging.mkdir(parents=True)
        # Changing the process-wide umask is not safe while other threads run, so masked modes are set afterwards.
        self._repair_modes = bool(_umask() & ~0o022)
        self._names = itertools.count()
        self._root = f"{root}/"  # on the hot path, text is quicker than Path

    def put(self, path: str, text: str, mode: int = 0o444) -> None:
        """Make or replace a file."""
        temporary = self._temporary()
        self._write(temporary, text, mode)
        os.rename(temporary, self._root + path)

    def overwrite(self, path: str, text: str) -> None:
        """Change a file in place. Only for one digit and a newline, which readers see at once."""
        descriptor = os.open(self._root + path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def restore(self, path: str, text: str, mode: int) -> None:
        """Restore a file that a writer has emptied by opening it with O_TRUNC, which real sysfs ignores."""
        try:
            intact = os.stat(self._root + path).st_size == len(text)
        except FileNotFoundError:
            return
        if not intact:
            self.put(path, text, mode)

    def link(self, path: str, target: str) -> None:
        """Make or replace a link to `target`. Both paths are relative to the root; the link's text is relative."""
        text = os.path.relpath(target, os.path.dirname(path))
        try:
            os.symlink(text, self._root + path)
        except FileExistsError:
            temporary = self._temporary()
            os.symlink(text, temporary)
            os.rename(temporary, self._root + path)

    def unlink(self, path: str) -> None:
        """Remove a file or link, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._root + path)

    def make_directory(self, path: str, entries: Iterable[Entry] = (), mode: int = 0o755) -> None:
        """Make a directory with files (paths relative to it) in one step. Missing parents are made."""
        temporary = self._temporary()
        os.mkdir(temporary, mode)
        made = set(_EMPTY_PARENT)
        for name, text, file_mode in entries:
            parent = os.path.dirname(name)
            if parent not in made:
                os.makedirs(f"{temporary}/{parent}", exist_ok=True)
                made.add(parent)
            self._write(f"{temporary}/{name}", text, file_mode)
        if self._repair_modes:
            os.chmod(temporary, mode)
        target = self._root + path
        try:
            os.rename(temporary, target)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.rename(temporary, target)

    def remove_directory(self, path: str) -> None:
        """Remove a directory and its contents, if it exists."""
        temporary = self._temporary()
        try:
            os.rename(self._root + path, temporary)
        except FileNotFoundError:
            return
        shutil.rmtree(temporary)

    def _temporary(self) -> str:
        return f"{self.staging}/{next(self._names)}"

    def _write(self, path: str, text: str, mode: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            if text:
                os.write(descriptor, text.encode())
            if self._repair_modes:
                os.fchmod(descriptor, mode)
        finally:
            os.close(descriptor)


def _umask() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
