"""The only code that writes to sysfs. It creates and truncates nothing; its callers choose the text."""

import errno
import os

from qat_helper.errors import OperationError
from qat_shared.messages import ErrorCode
from qat_shared.sysfs import MissingError, PciDevice


def write(device: PciDevice, name: str, text: str, doing: str, directory: int | None = None) -> None:
    """Write an attribute of a device, or of another `directory` on its behalf. `doing` completes the error message.

    Raises OperationError.
    """
    data = text.encode("ascii")
    where = device.descriptor if directory is None else directory
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=where)
        try:
            _check_locations(device, descriptor, where, name)
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    except OSError as error:
        raise _write_error(device, doing, error.errno or 0) from error


def _check_locations(device: PciDevice, descriptor: int, directory: int, name: str) -> None:
    """Check that the device is still in its place, and that the opened file is the attribute, not a link's target.

    All links in sysfs are the kernel's. The check also holds if something else is where sysfs should be. Raises
    OperationError.
    """
    # Checked before each write that contains its address: once the device is gone, another one may have that address.
    if _path_of(device.descriptor) != device.place or device.read_optional("vendor") is None:
        raise OperationError(ErrorCode.VANISHED, f"{device.address} was removed during the operation")
    place, expected = _path_of(descriptor), f"{_path_of(directory)}/{name}"
    if place not in (expected, f"{expected} (deleted)"):  # deleted: the same attribute, replaced or removed
        raise OperationError(ErrorCode.KERNEL, f"{expected} leads to {place}: it is not the kernel's attribute")


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _write_error(device: PciDevice, doing: str, number: int) -> OperationError:
    try:
        device.read("vendor")
    except MissingError:
        return OperationError(ErrorCode.VANISHED, f"{device.address} was removed during the operation", number)
    hint = ""
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = (
            "; the helper needs uid 0 and sysfs mounted read-write; "
            "if the device appeared after the helper started, restart the helper"
        )
    return OperationError(
        ErrorCode.KERNEL, f"{device.address}: the kernel refused to {doing}: {os.strerror(number)}{hint}", number
    )
