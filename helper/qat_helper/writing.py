"""The only code that writes to sysfs. Nothing is created or truncated; what is written is its callers' to choose."""

import errno
import os

from qat_helper.errors import OperationError
from qat_shared.messages import ErrorCode
from qat_shared.sysfs import MissingError, PciDevice


def write(device: PciDevice, name: str, text: str, doing: str, directory: int | None = None) -> None:
    """Write an attribute of a device, or of another directory on its behalf. `doing` is for the error's sentence.

    Raises OperationError.
    """
    data = text.encode("ascii")
    where = device.descriptor if directory is None else directory
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=where)
        try:
            _check_place(device, descriptor, where, name)
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    except OSError as error:
        raise _refused(device, doing, error.errno or 0) from error


def _check_place(device: PciDevice, descriptor: int, directory: int, name: str) -> None:
    """The device is where it was, and what was opened is what its name says, not what a link leads to.

    Links in sysfs are the kernel's own; this holds whatever lies where sysfs should be. Raises OperationError.
    """
    # Before each write that names it by its address: once it has gone, that may be another device's.
    if _place(device.descriptor) != device.place or device.read_optional("vendor") is None:
        raise OperationError(ErrorCode.VANISHED, f"{device.address} went away meanwhile")
    place, expected = _place(descriptor), f"{_place(directory)}/{name}"
    if place not in (expected, f"{expected} (deleted)"):  # deleted: the same attribute, replaced or gone
        raise OperationError(ErrorCode.KERNEL, f"{expected} leads to {place}: it is not what the kernel made")


def _place(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _refused(device: PciDevice, doing: str, number: int) -> OperationError:
    try:
        device.read("vendor")
    except MissingError:
        return OperationError(ErrorCode.VANISHED, f"{device.address} went away meanwhile", number)
    hint = ""
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = (
            "; the helper needs uid 0 and sysfs mounted read-write; "
            "if the device's host bridge came after the helper's start, start the helper again"
        )
    return OperationError(
        ErrorCode.KERNEL, f"{device.address}: the kernel refused to {doing}: {os.strerror(number)}{hint}", number
    )
