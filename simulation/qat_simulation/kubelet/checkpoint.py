"""The emulated kubelet's checkpoint: the state that survives a restart. The name is the real one, the format is not."""

import os
import zlib
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from qat_simulation.kubelet.pods import Pods

NAME: Final = "kubelet_internal_checkpoint"


class Checkpoint(Struct):
    """The registered resources, and the devices that pods hold."""

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
    """Read the checkpoint. A missing or broken one counts as empty: the real kubelet too continues without it."""
    try:
        file = msgspec.json.decode((directory / NAME).read_bytes(), type=_File)
        if zlib.crc32(bytes(file.data)) != file.checksum:
            return Checkpoint([], {})
        return msgspec.json.decode(file.data, type=Checkpoint)
    except (FileNotFoundError, msgspec.MsgspecError):
        return Checkpoint([], {})


def clean_up(directory: Path) -> None:
    """CleanupPluginDirectory: remove all sockets at the top; subdirectories and other files stay."""
    for path in directory.iterdir():
        if path.name != NAME and path.is_socket():
            path.unlink()
