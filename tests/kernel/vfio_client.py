"""A VFIO user, as DPDK's EAL is one: opens VFs by their addresses through container and group, and says what it got.

    python vfio_client.py [ADDRESS...]      without addresses: those in QAT0, QAT1, ... of the environment

Prints one line of JSON, then holds all open until its standard input ends. It imports nothing of the project's, so that
it can run anywhere. Numbers: the kernel's include/uapi/linux/vfio.h.
"""

import ctypes
import fcntl
import json
import mmap
import os
import struct
import sys

VERSION, CHECK_EXTENSION, SET_IOMMU = 0x3B64, 0x3B65, 0x3B66
GROUP_STATUS, GROUP_SET_CONTAINER, GROUP_DEVICE = 0x3B67, 0x3B68, 0x3B6A
DEVICE_INFO, REGION_INFO, RESET, MAP_DMA = 0x3B6B, 0x3B6C, 0x3B6F, 0x3B71
TYPE1V2, NOIOMMU = 3, 8
CONFIG_REGION = 7
VIABLE = 1
MAP_SIZE = 64 * 1024


class VfioUser:
    """Some VFs in one container, open until `close`. Raises OSError as the kernel does."""

    def __init__(self, *addresses: str) -> None:
        self.seen: dict[str, object] = {}
        self._open: list[int] = []
        try:
            self._container = self._hold(os.open("/dev/vfio/vfio", os.O_RDWR))
            self.seen["api"] = fcntl.ioctl(self._container, VERSION)
            self.seen["type1v2"] = fcntl.ioctl(self._container, CHECK_EXTENSION, TYPE1V2)
            self.seen["devices"] = {
                address: self._device(address, not number) for number, address in enumerate(addresses)
            }
        except OSError:
            self.close()
            raise

    def _hold(self, descriptor: int) -> int:
        self._open.append(descriptor)
        return descriptor

    def _device(self, address: str, first: bool) -> dict[str, object]:
        group_name = os.path.basename(os.readlink(f"/sys/bus/pci/devices/{address}/iommu_group"))
        without = _name_of(address) == "vfio-noiommu"
        group = self._hold(os.open(f"/dev/vfio/{'noiommu-' if without else ''}{group_name}", os.O_RDWR))
        status = bytearray(struct.pack("II", 8, 0))
        fcntl.ioctl(group, GROUP_STATUS, status)
        fcntl.ioctl(group, GROUP_SET_CONTAINER, bytearray(struct.pack("i", self._container)))
        if first:
            fcntl.ioctl(self._container, SET_IOMMU, NOIOMMU if without else TYPE1V2)
        device = self._hold(fcntl.ioctl(group, GROUP_DEVICE, bytearray(address.encode() + b"\0")))
        info = bytearray(struct.pack("5I", 20, 0, 0, 0, 0))
        fcntl.ioctl(device, DEVICE_INFO, info)
        region = bytearray(struct.pack("4I2Q", 32, 0, CONFIG_REGION, 0, 0, 0))
        fcntl.ioctl(device, REGION_INFO, region)
        size, offset = struct.unpack("4I2Q", region)[4:]
        vendor, number = struct.unpack("<2H", os.pread(device, 4, offset))
        fcntl.ioctl(device, RESET)
        return {
            "group": int(group_name),
            "viable": bool(struct.unpack("II", status)[1] & VIABLE),
            "regions": struct.unpack("5I", info)[2],
            "config_size": size,
            "id": f"{vendor:04x}:{number:04x}",
        }

    def map_memory(self) -> None:
        """Let the devices reach a little memory of ours."""
        memory = mmap.mmap(-1, MAP_SIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fcntl.ioctl(self._container, MAP_DMA, struct.pack("II3Q", 32, 3, address, 0x100000000, MAP_SIZE))
        self.seen["mapped"] = MAP_SIZE
        self._memory = memory

    def close(self) -> None:
        """Let all go; nothing happens the second time."""
        for descriptor in reversed(self._open):
            os.close(descriptor)
        self._open.clear()


def _name_of(address: str) -> str:
    """What the kernel says of a group that vfio has made; "" of an IOMMU's."""
    try:
        with open(f"/sys/bus/pci/devices/{address}/iommu_group/name") as name:
            return name.read().strip()
    except FileNotFoundError:
        return ""


def main() -> None:
    variables = (f"QAT{number}" for number in range(len(os.environ)))
    addresses = sys.argv[1:] or [os.environ[name] for name in variables if name in os.environ]
    user = VfioUser(*addresses)
    user.map_memory()
    user.seen |= {
        "dev": sorted(os.listdir("/dev")),
        "environment": dict(os.environ),
        "vfio": sorted(os.listdir("/dev/vfio")),
    }
    user.seen |= {"uid": os.geteuid(), "capabilities": _capabilities()}
    print(json.dumps(user.seen), flush=True)
    sys.stdin.read()


def _capabilities() -> str:
    with open("/proc/self/status") as status:
        return next(line.split()[1] for line in status if line.startswith("CapEff"))


if __name__ == "__main__":
    main()
