"""A directory like a ConfigMap's mount by the kubelet: one rename of a link replaces all files at once.

    qat.conf -> ..data/qat.conf        ..data -> ..2026_11_24_06_00_00.1        ..2026_11_24_06_00_00.1/qat.conf

Sources: the kubelet's pkg/volume/util/atomic_writer.go; pkg/volume/emptydir/empty_dir.go for the mount's own mode.
"""

import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_DATA: Final = "..data"


class ConfigMap:
    """Empty at first; `write` replaces the version that is mounted. `mode`: the volume's defaultMode."""

    def __init__(self, directory: Path, mode: int = 0o644) -> None:
        self.directory = directory
        self._mode = mode
        self._versions = itertools.count(1)
        directory.mkdir()
        directory.chmod(0o777)
        self.write({})

    def write(self, files: Mapping[str, str]) -> None:
        """Replace all files; `files` has their names and texts."""
        data = self.directory / _DATA
        before = os.readlink(data) if data.is_symlink() else None
        version = f"..2026_11_24_06_00_00.{next(self._versions)}"
        (self.directory / version).mkdir()
        (self.directory / version).chmod(0o755)
        for name, text in files.items():
            (self.directory / version / name).write_text(text)
            (self.directory / version / name).chmod(self._mode)
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
