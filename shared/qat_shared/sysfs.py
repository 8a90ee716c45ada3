"""Readers of the kernel's PCI tree in sysfs, beneath a given root. Nothing here writes.

A device is read through one directory descriptor (PciDevice), so that all values belong to the same device even if the
links to it change. Formats: the kernel's Documentation/ABI/testing/sysfs-bus-pci.

    <root>/bus/pci/devices/0000:6b:00.1 -> ../../../devices/pci0000:6b/0000:6b:00.1
        vendor device numa_node driver_override enable   text attributes
        driver iommu_group physfn virtfnN                links
        qat/state qat/cfg_services uio/uioN              in subdirectories
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final

from qat_shared.pci import PciAddress

ATTRIBUTE_LIMIT: Final = 4096  # the kernel's limit: an attribute is at most one page
# ENODEV and ENXIO: the device was removed while the file was open.
_NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO})
_VIRTFN = re.compile(r"virtfn([0-9]+)", re.ASCII)


class SysfsError(Exception):
    """Reading sysfs failed: `path`, relative to `where` (a device or the root), because of `why`."""

    def __init__(self, where: str, path: str, why: str) -> None:
        super().__init__(f"{where}: {path}: {why}")
        self.where = where
        self.path = path
        self.why = why


class MissingError(SysfsError):
    """The device, attribute or link does not exist (any more)."""


class MalformedError(SysfsError):
    """It exists, but the kernel would not have written it so."""


def pci_directory(root: Path) -> Path:
    """`<root>/bus/pci`, after checking that root is a sysfs tree with a PCI bus. Raises SysfsError."""
    pci = root / "bus" / "pci"
    try:
        with os.scandir(pci / "devices"):
            pass
    except OSError as error:
        raise SysfsError(
            str(root), "bus/pci/devices", f"not a readable sysfs tree ({os.strerror(error.errno or 0)})"
        ) from error
    return pci


class PciDevice:
    """A device's directory, held open; `place` was its path when opened. Made by `open_device`."""

    def __init__(self, address: PciAddress, descriptor: int, place: str) -> None:
        self.address = address
        self.descriptor = descriptor
        self.place = place

    def read(self, name: str) -> str:
        """A text attribute, stripped. Raises MissingError, MalformedError or SysfsError."""
        text = self.read_optional(name)
        if text is None:
            raise MissingError(str(self.address), name, "not there")
        return text

    def read_optional(self, name: str) -> str | None:
        """As `read`, but None when the attribute does not exist."""
        try:
            # O_NONBLOCK: if this is a pipe, opening it must not wait for a writer.
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self.descriptor)
            try:
                raw = os.read(descriptor, ATTRIBUTE_LIMIT + 1)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None  # common for optional attributes; an exception costs more than the read
            raise self._failed(name, error) from error
        if len(raw) > ATTRIBUTE_LIMIT:
            raise MalformedError(str(self.address), name, f"longer than {ATTRIBUTE_LIMIT} bytes")
        try:
            text = raw.decode("ascii").strip()
        except UnicodeDecodeError:
            raise MalformedError(str(self.address), name, "not text") from None
        if "\0" in text:
            raise MalformedError(str(self.address), name, "not text")
        return text

    def read_int(self, name: str, base: int = 10) -> int:
        """A number, in base 10, or 16 for vendor and device (0x8086). Raises as `read` does."""
        text = self.read(name)
        try:
            if len(text) > 20 or "_" in text:  # valid in Python, never printed by the kernel
                raise ValueError
            return int(text, base)
        except ValueError:
            raise MalformedError(str(self.address), name, f"{text[:40]!r} is not a number") from None

    def link(self, name: str) -> str | None:
        """The last component of a link's target (driver: vfio-pci; iommu_group: 12), None without the link."""
        try:
            target = os.readlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise MalformedError(str(self.address), name, "not a link") from error
            raise self._failed(name, error) from error
        if not target.isascii():
            raise MalformedError(str(self.address), name, "not text")
        return target.rpartition("/")[2]

    def linked_address(self, name: str) -> PciAddress | None:
        """The device that a link (physfn, virtfn3) points to, None without the link. Raises MalformedError."""
        target = self.link(name)
        if target is None:
            return None
        try:
            return PciAddress.parse(target)
        except ValueError as error:
            raise MalformedError(str(self.address), name, str(error)) from None

    def names(self, folder: str = ".") -> list[str]:
        """The sorted names in a directory of the device; empty when it does not exist."""
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._failed(folder, error) from error
        try:
            return sorted(os.listdir(descriptor))
        finally:
            os.close(descriptor)

    def virtual_functions(self) -> Iterator[tuple[str, PciAddress | MalformedError]]:
        """The virtfnN links of a PF in the order of N, each with its VF's address or its error."""
        numbered = [(int(match[1]), match[0]) for match in map(_VIRTFN.fullmatch, self.names()) if match]
        for _, name in sorted(numbered):
            try:
                address = self.linked_address(name)
            except MalformedError as error:
                yield name, error
                continue
            if address is not None:
                yield name, address

    def _failed(self, name: str, error: OSError) -> SysfsError:
        if error.errno in _NOT_THERE:
            return MissingError(str(self.address), name, "not there")
        if error.errno in (errno.EISDIR, errno.ELOOP):
            return MalformedError(str(self.address), name, os.strerror(error.errno))
        return SysfsError(str(self.address), name, os.strerror(error.errno or 0))


@lru_cache(maxsize=8)  # discovery of a thousand VFs calls it a thousand times
def _real(root: Path) -> str:
    return os.path.realpath(root)


@contextmanager
def open_device(root: Path, address: PciAddress) -> Iterator[PciDevice]:
    """Hold a device's directory open. Raises MissingError when there is no such device, otherwise MalformedError.

    The directory's own name must be the address, beneath devices/: a link to anywhere else is refused.
    """
    path = f"{root}/bus/pci/devices/{address}"  # Path objects would take a fifth of the discovery of a thousand VFs
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        kind = MissingError if error.errno in (errno.ENOENT, errno.ENOTDIR) else MalformedError
        raise kind(str(address), "device", os.strerror(error.errno or 0)) from error
    try:
        place = os.readlink(f"/proc/self/fd/{descriptor}")
        real = place.rpartition("/")[2]
        if real == f"{address} (deleted)":
            raise MissingError(str(address), "device", "was removed")
        if real != str(address):
            raise MalformedError(str(address), "device", f"leads to {real[:40]!r}, not to the device itself")
        if not place.startswith(f"{_real(root)}/devices/"):
            raise MalformedError(str(address), "device", f"leads to {place}, outside {root}/devices")
        yield PciDevice(address, descriptor, place)
    finally:
        os.close(descriptor)
