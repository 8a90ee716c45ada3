"""An emulated kernel in a short-named temporary folder, for tests."""

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import Node

PF = "0000:6b:00.0"
VF = "0000:6b:00.1"
VF2 = "0000:6b:00.2"


@contextmanager
def emulated(node: Node) -> Iterator[Kernel]:
    """A kernel that runs while the block does; asserts that it recorded no defects."""
    # On tmpfs if there is one: renames are slow on a disk. Short, since a socket's path has at most 107 bytes.
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    directory = Path(tempfile.mkdtemp(prefix="qat-", dir=parent))
    try:
        with Kernel(directory, node) as kernel:
            yield kernel
        assert kernel.defects == []
    finally:
        shutil.rmtree(directory)


def read(kernel: Kernel, path: str) -> str:
    """An attribute's text; the path is relative to the sysfs root."""
    return (kernel.sysfs_root / path).read_text()


def attribute(address: str, name: str) -> str:
    """The path of a device's attribute through bus/pci/devices."""
    return f"bus/pci/devices/{address}/{name}"


def real(address: str, name: str) -> str:
    """The real path of an attribute, as the emulated kernel gets it: of a device on its own root bus."""
    return f"devices/pci{address[:7]}/{address}/{name}"


def background(function: Callable[[], object]) -> threading.Thread:
    """Run it in a thread; an OSError just ends it."""

    def run() -> None:
        with contextlib.suppress(OSError):
            function()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


class Writes:
    """Replaces os in writing.py: sends writes to the emulated kernel, and records them."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.seen: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        relative = os.path.relpath(path, os.path.realpath(self.kernel.sysfs_root))
        self.seen.append((relative.removeprefix("devices/pci0000:6b/"), data.decode()))
        return self.kernel.write(relative, data)
