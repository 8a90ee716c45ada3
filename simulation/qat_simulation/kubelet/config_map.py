"""A directory as the kubelet mounts a ConfigMap there: all files are replaced at once, by one rename of a link.

    qat.conf -> ..data/qat.conf        ..data -> ..2026_11_24_06_00_00.1        ..2026_11_24_06_00_00.1/qat.conf

Source: the kubelet's pkg/volume/util/atomic_writer.go.
"""

import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_DATA: Final = "..data"


class ConfigMap:
    """Made empty; `write` puts another version in its place."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._versions = itertools.count(1)
        directory.mkdir()
        self.write({})

    def write(self, files: Mapping[str, str]) -> None:
        """Replace all files by these: names and texts."""
        data = self.directory / _DATA
        before = os.readlink(data) if data.is_symlink() else None
        version = f"..2026_11_24_06_00_00.{next(self._versions)}"
        (self.directory / version).mkdir()
        for name, text in files.items():
            (self.directory / version / name).write_text(text)
        temporary = self.directory / "..data_tmp"
        temporary.symlink_to(version)
        temporary.rename(data)
        for name in files:
            if not (self.directory / name).is_symlink():
                (self.directory / name).symlink_to(f"{_DATA}/{name}")
        for link in self.directory.iterdir():
            if not link.name.startswith("..") and link.name not in files:
                link.unlink()
        if before is not None:
            shutil.rmtree(self.directory / before)
