"""The sysfs tree on disk: plain files, folders and links, each change seen by readers at once or not at all.

Nothing is decided here. Files and folders are made in a folder beside the tree and renamed into it, so that no reader
ever finds half of one, and none finds a temporary name. Paths are relative to the sysfs root.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

Entry = tuple[str, str, int]
"""A file: its path, what it holds, its mode."""

_EMPTY_PARENT = frozenset({"", "."})


class Tree:
    """`root` is the sysfs root, `aside` the folder for what is not in the tree yet, or no more."""

    def __init__(self, root: Path, aside: Path) -> None:
        self.root = root
        self.aside = aside
        root.mkdir(parents=True)
        aside.mkdir(parents=True)
        # A process-wide umask cannot be changed safely beside other threads, so modes are repaired where it bites.
        self._repair_modes = bool(_umask() & ~0o022)
        self._names = itertools.count()
        self._root = f"{root}/"  # this is the hot path: text is quicker than Path

    def put(self, path: str, text: str, mode: int = 0o444) -> None:
        """Make or replace a file."""
        temporary = self._temporary()
        self._write(temporary, text, mode)
        os.rename(temporary, self._root + path)

    def overwrite(self, path: str, text: str) -> None:
        """Change a file in place where that is as good as at once: a digit and a newline for another."""
        descriptor = os.open(self._root + path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def restore(self, path: str, text: str, mode: int) -> None:
        """Put a file back if a writer has emptied it by opening it with O_TRUNC, which real sysfs ignores."""
        try:
            intact = os.stat(self._root + path).st_size == len(text)
        except FileNotFoundError:
            return
        if not intact:
            self.put(path, text, mode)

    def link(self, path: str, target: str) -> None:
        """Make or replace a link to `target`, which is relative to the root too; the link itself is relative."""
        text = os.path.relpath(target, os.path.dirname(path))
        try:
            os.symlink(text, self._root + path)
        except FileExistsError:
            temporary = self._temporary()
            os.symlink(text, temporary)
            os.rename(temporary, self._root + path)

    def unlink(self, path: str) -> None:
        """Remove a file or link; nothing happens when there is none."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._root + path)

    def folder(self, path: str, entries: Iterable[Entry] = (), mode: int = 0o755) -> None:
        """Make a folder with files in it (their paths relative to it), all at once. Its parent is made as needed."""
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

    def remove_folder(self, path: str) -> None:
        """Remove a folder and all in it; nothing happens when there is none."""
        temporary = self._temporary()
        try:
            os.rename(self._root + path, temporary)
        except FileNotFoundError:
            return
        shutil.rmtree(temporary)

    def _temporary(self) -> str:
        return f"{self.aside}/{next(self._names)}"

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
