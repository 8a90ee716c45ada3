"""What is done to a kernel by hand, step by step, in the same words for the real and the emulated one.

A case (cases.py has them) is a node and steps; `observe` runs them and tells all that could be seen: what each write
was answered, what attributes and links showed after it, and the uevents. Nothing here knows which kernel it has.
"""

import difflib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from msgspec import Struct

from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import Node

NETLINK_KOBJECT_UEVENT: Final = 15
KERNEL_GROUP: Final = 1


class Held(Protocol):
    """A VF that is open."""

    def close(self) -> None: ...


class AnyKernel(Protocol):
    """As both kernels are."""

    @property
    def sysfs_root(self) -> Path: ...

    def write(self, path: str, data: bytes | str) -> int: ...

    def open_vfio(self, address: str) -> Held: ...

    def set_heartbeat(self, address: str, status: Any) -> None: ...


class Write(Struct, frozen=True):
    """write(2) of `data` to an attribute; its path beneath bus/pci/devices when it begins with an address."""

    path: str
    data: str

    def run(self, kernel: AnyKernel, held: dict[str, Held]) -> object:
        path = f"bus/pci/devices/{self.path}" if self.path[:1].isdigit() else self.path
        # As the kernel names it, without links on the way.
        directory, name = os.path.split(kernel.sysfs_root / path)
        return kernel.write(os.path.relpath(f"{os.path.realpath(directory)}/{name}", kernel.sysfs_root), self.data)


class Open(Struct, frozen=True):
    """Open a VF through vfio-pci."""

    address: str

    def run(self, kernel: AnyKernel, held: dict[str, Held]) -> object:
        held[self.address] = kernel.open_vfio(self.address)
        return "open"


class Close(Struct, frozen=True):
    """Close it."""

    address: str

    def run(self, kernel: AnyKernel, held: dict[str, Held]) -> object:
        held.pop(self.address).close()
        return "closed"


class Begin(Struct, frozen=True):
    """A write that waits inside the kernel; until `address` has no driver any more, which shows at once."""

    write: Write
    address: str

    def run(self, kernel: AnyKernel, held: dict[str, Held]) -> object:
        waiting = Waiting(lambda: self.write.run(kernel, {}))
        held[self.write.path] = waiting
        driver = kernel.sysfs_root / "bus/pci/devices" / self.address / "driver"
        while driver.is_symlink():
            time.sleep(0.01)
        return waiting.is_alive()


class End(Struct, frozen=True):
    """The end of such a write, which must come now: what it was answered."""

    path: str

    def run(self, kernel: AnyKernel, held: dict[str, Held]) -> object:
        waiting = held.pop(self.path)
        assert isinstance(waiting, Waiting)
        waiting.close()
        return waiting.answer


class Waiting(threading.Thread):
    """A step in a thread of its own."""

    def __init__(self, step: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._step = step
        self.answer: object = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._step()
        except OSError as error:
            self.answer = errno.errorcode[error.errno or 0]

    def close(self) -> None:
        self.join(60)
        assert not self.is_alive(), "it still waits"


class Heartbeat(Struct, frozen=True):
    """The firmware dies, or lives again."""

    address: str
    status: int

    def run(self, kernel: AnyKernel, held: dict[str, Held]) -> object:
        kernel.set_heartbeat(self.address, self.status)
        return self.status


Step = Write | Open | Close | Begin | End | Heartbeat


class Case(Struct, frozen=True):
    """`watched`: the functions that are looked at after each step."""

    node: Node
    watched: tuple[str, ...]
    steps: tuple[Step, ...]


class Seen(Struct, frozen=True):
    """What could be seen of a case: step by step, then the uevents of all of it."""

    before: dict[str, dict[str, str]]
    steps: list[tuple[str, object, dict[str, dict[str, str]]]]
    uevents: list[tuple[str, ...]]


_POWER: Final = "power/runtime_status"
_PATIENCE: Final = 60.0
TEXTS: Final = (
    *("driver_override", "enable", _POWER, "sriov_numvfs", "sriov_drivers_autoprobe"),
    *("qat/state", "qat/cfg_services", "qat/auto_reset", "qat/num_rps"),
)
CONSTANTS: Final = (
    *("vendor", "device", "subsystem_vendor", "subsystem_device", "class", "revision", "modalias", "numa_node"),
    *("uevent", "sriov_totalvfs", "sriov_offset", "sriov_stride", "sriov_vf_device"),
)
LINKS: Final = ("driver", "physfn", "subsystem")


WAITING: Final = ("driver_override", "sriov_numvfs")
"""Reading these takes the device's lock: on the real kernel it waits for a write that waits."""


def look(kernel: AnyKernel, address: str, *, constants: bool = False, waiting: bool = False) -> dict[str, str]:
    """A function's attributes and links now; empty when it is not there. `waiting`: a write is."""
    device = kernel.sysfs_root / "bus/pci/devices" / address
    if not device.exists():
        return {}
    seen = {}
    for name in (*TEXTS, *(CONSTANTS if constants else ())):
        if (device / name).exists() and not (waiting and name in WAITING):
            seen[name] = _read(device / name)
    for name in LINKS:
        if (device / name).is_symlink():
            seen[name] = os.readlink(device / name).rpartition("/")[2]
    seen["iommu_group"] = str((device / "iommu_group").exists())
    virtual = sorted(
        (path for path in device.iterdir() if path.name.startswith("virtfn")), key=lambda path: len(path.name)
    )
    seen["virtfn"] = " ".join(sorted(f"{path.name}{'' if path.exists() else '(dangling)'}" for path in virtual))
    for debugfs in (kernel.sysfs_root / "kernel/debug").glob(f"qat_*_{address}"):
        seen["debugfs"] = debugfs.name
        for name in ("dev_cfg", "heartbeat/status"):
            seen[name] = _read(debugfs / name)
    return seen


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _settle(kernel: AnyKernel, wanted: dict[str, dict[str, str]]) -> None:
    """Wait until all these are as suspended as wanted, or long enough."""
    deadline = time.monotonic() + _PATIENCE
    for address, seen in wanted.items():
        path = kernel.sysfs_root / "bus/pci/devices" / address / _POWER
        while _POWER in seen and _read(path) != seen[_POWER] and time.monotonic() < deadline:
            time.sleep(0.01)


def observe(kernel: AnyKernel, case: Case, uevents: socket.socket, like: Seen | None = None) -> Seen:
    """Run a case's steps. What is still open at the end is closed. The real kernel suspends devices in a worker, after
    the write that lets it: so it is looked at when they are as in `like`, or never come to be."""
    held: dict[str, Held] = {}
    drain(uevents)
    if like is not None:
        _settle(kernel, like.before)
    before = {address: look(kernel, address, constants=True) for address in case.watched}
    steps: list[tuple[str, object, dict[str, dict[str, str]]]] = []
    try:
        for step in case.steps:
            try:
                result = step.run(kernel, held)
            except OSError as error:
                result = errno.errorcode[error.errno or 0]
            waiting = any(isinstance(each, Waiting) for each in held.values())
            # With what it waited for closed, the write goes on, at its own pace.
            watched = () if waiting and isinstance(step, Close) else case.watched
            if like is not None:
                _settle(kernel, like.steps[len(steps)][2])
            seen = {address: look(kernel, address, waiting=waiting) for address in watched}
            steps.append((str(step), result, seen))
    finally:
        for each in held.values():
            each.close()
    return Seen(before, steps, [*map(summary, filter(relevant, drain(uevents)))])


@contextmanager
def kernel_uevents() -> Iterator[socket.socket]:
    """The real kernel's."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind((0, KERNEL_GROUP))
        sock.setblocking(False)
        yield sock


@contextmanager
def emulated_uevents(kernel: Kernel, address: str) -> Iterator[socket.socket]:
    """The emulated kernel's. It accepts a listener a moment after it has connected: a device is asked for one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(os.fspath(kernel.uevents_path))
        sock.setblocking(False)
        asked = Write(f"{address}/uevent", "change")
        while not drain(sock):
            asked.run(kernel, {})
        yield sock


def drain(sock: socket.socket) -> list[dict[str, str]]:
    """All packets that are there: both kernels have sent them before a write returns."""
    packets: list[dict[str, str]] = []
    while True:
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            return packets
        packets.append(dict(part.split("=", 1) for part in data.decode().split("\0") if "=" in part))


def relevant(packet: dict[str, str]) -> bool:
    """Of the devices here, or of what vfio and uio make of them."""
    return packet["SUBSYSTEM"] in ("pci", "vfio", "uio")


def summary(packet: dict[str, str]) -> tuple[str, ...]:
    """What of a packet must be the same: not numbers that the kernel counts."""
    fields = sorted(
        f"{name}={value}" for name, value in packet.items() if name in ("DRIVER", "PCI_ID", "PCI_SLOT_NAME")
    )
    where = packet["DEVPATH"] if packet["SUBSYSTEM"] == "pci" else packet["SUBSYSTEM"]
    return packet["ACTION"], where, *fields


def differences(ours: Seen, theirs: Seen) -> list[str]:
    """What the emulated kernel (ours) did otherwise, one sentence each."""
    found = list(_attributes("before", ours.before, theirs.before))
    for (step, result, seen), (_, its_result, its_seen) in zip(ours.steps, theirs.steps, strict=True):
        if result != its_result:
            found.append(f"{step}: answered {result!r}, the kernel answers {its_result!r}")
        found += _attributes(step, seen, its_seen)
    mine, its = (list(map(" ".join, seen.uevents)) for seen in (ours, theirs))
    found += [line for line in difflib.ndiff(mine, its) if line[0] in "-+"]
    return found


def _attributes(when: str, ours: dict[str, dict[str, str]], theirs: dict[str, dict[str, str]]) -> Iterator[str]:
    for address, attributes in ours.items():
        for name in sorted({*attributes, *theirs[address]}):
            mine, its = attributes.get(name), theirs[address].get(name)
            if mine != its:
                yield f"{when}: {address}/{name} is {mine!r}, the kernel's is {its!r}"
