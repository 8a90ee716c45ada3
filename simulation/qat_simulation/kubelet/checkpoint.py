"""The emulated kubelet's checkpoint: what it remembers over a restart. In a format of its own, under the real name."""

import os
import zlib
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from qat_simulation.kubelet.pods import Pods

NAME: Final = "kubelet_internal_checkpoint"


class Checkpoint(Struct):
    """The resources that were registered, and what pods hold."""

    resources: list[str]
    pods: Pods


class _File(Struct, rename="pascal"):
    data: msgspec.Raw
    checksum: int


def write(directory: Path, checkpoint: Checkpoint) -> None:
    """Replace the file in one step."""
    new = directory / f"{NAME}.new"
    data = msgspec.json.encode(checkpoint)
    new.write_bytes(msgspec.json.encode(_File(msgspec.Raw(data), zlib.crc32(data))))
    os.replace(new, directory / NAME)


def read(directory: Path) -> Checkpoint:
    """A checkpoint that cannot be read is as good as none: the real kubelet too goes on without."""
    try:
        file = msgspec.json.decode((directory / NAME).read_bytes(), type=_File)
        if zlib.crc32(bytes(file.data)) != file.checksum:
            return Checkpoint([], {})
        return msgspec.json.decode(file.data, type=Checkpoint)
    except (FileNotFoundError, msgspec.MsgspecError):
        return Checkpoint([], {})


def clean_up(directory: Path) -> None:
    """CleanupPluginDirectory: sockets at the top go, whosever they are; subdirectories and files stay."""
    for path in directory.iterdir():
        if path.name != NAME and path.is_socket():
            path.unlink()
