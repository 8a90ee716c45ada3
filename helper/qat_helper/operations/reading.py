"""ReadHeartbeat and ReadDeviceConfig: two files of the QAT driver in debugfs, which only root can read.

<sysfs root>/kernel/debug/qat_<PF driver>_<PF address>/{heartbeat/status,dev_cfg}; see the kernel's
Documentation/ABI/testing/debugfs-driver-qat. The driver's name comes from the device table.
"""

import errno
import os
from typing import Final

from qat_helper.errors import PENDING_HEAD, OperationError
from qat_helper.operations.node import Node, Outcome
from qat_shared.messages import DeviceConfig, ErrorCode, Heartbeat, ReadDeviceConfig, ReadHeartbeat
from qat_shared.pci import PciAddress
from qat_shared.sysfs import open_device

CONFIG_LIMIT: Final = 32 * 1024
HEARTBEAT_LIMIT: Final = 4096


def read_heartbeat(node: Node, request: ReadHeartbeat) -> Outcome:
    """Query a PF's firmware; reading the file sends the query. Raises OperationError, SysfsError."""
    text = _read(node, request.address, "heartbeat/status", HEARTBEAT_LIMIT)
    first = text.partition("\n")[0].strip()
    if first not in ("0", "-1"):
        raise OperationError(
            ErrorCode.KERNEL, f"{request.address}: heartbeat/status holds {first[:40]!r}, expected 0 or -1"
        )
    return Outcome(Heartbeat(id=request.id, audit=PENDING_HEAD, alive=first == "0"))


def read_device_config(node: Node, request: ReadDeviceConfig) -> Outcome:
    """A PF's configuration as its driver reports it. Raises OperationError, SysfsError."""
    text = _read(node, request.address, "dev_cfg", CONFIG_LIMIT)
    return Outcome(DeviceConfig(id=request.id, audit=PENDING_HEAD, text=text))


def _read(node: Node, address: PciAddress, name: str, limit: int) -> str:
    with open_device(node.sysfs_root, address) as device:
        driver = node.policy.check_physical(device)
        if device.link("driver") != driver:
            raise OperationError(
                ErrorCode.UNAVAILABLE,
                f"{address} is not bound to {driver}: only that driver provides its {name}",
            )
    path = node.sysfs_root / "kernel" / "debug" / f"qat_{driver}_{address}" / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise OperationError(
                ErrorCode.UNAVAILABLE, f"{path} does not exist: is debugfs mounted, and does this kernel have it?"
            ) from error
        why = os.strerror(error.errno or 0)
        raise OperationError(ErrorCode.KERNEL, f"{path} cannot be read: {why}", error.errno or 0) from error
    if len(data) > limit or not data.isascii():
        raise OperationError(ErrorCode.KERNEL, f"{path} is not ASCII text of at most {limit} bytes")
    return data.decode("ascii")
