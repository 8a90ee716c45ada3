"""What is done to a kernel by hand, step by step, in the same words for the real and the emulated one.

A case is a node and steps; `observe` runs them and tells all that could be seen: what each write was answered, what
the attributes and links showed after it, and the uevents. Nothing here knows which kernel it has.
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

from qat_server.events import _KERNEL_GROUP, _NETLINK_KOBJECT_UEVENT
from qat_server.simulation.kernel import Kernel
from qat_server.simulation.node import LoneVf, Node, OtherDevice, Pf

PF: Final = "0000:6b:00.0"
VF: Final = "0000:6b:00.1"
VF2: Final = "0000:6b:00.2"
GEN6: Final = "0000:e8:00.0"
GEN2: Final = "0000:3d:00.0"
LONE: Final = "0000:a1:00.0"


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


TEXTS: Final = (
    *("driver_override", "enable", "power/runtime_status", "sriov_numvfs", "sriov_drivers_autoprobe"),
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


def observe(kernel: AnyKernel, case: Case, uevents: socket.socket) -> Seen:
    """Run a case's steps. What is still open at the end is closed."""
    held: dict[str, Held] = {}
    drain(uevents)
    before = {address: look(kernel, address, constants=True) for address in case.watched}
    steps: list[tuple[str, object, dict[str, dict[str, str]]]] = []
    try:
        for step in case.steps:
            try:
                result = step.run(kernel, held)
            except OSError as error:
                result = errno.errorcode[error.errno or 0]
            waiting = any(isinstance(each, Waiting) for each in held.values())
            seen = {address: look(kernel, address, waiting=waiting) for address in case.watched}
            steps.append((str(step), result, seen))
    finally:
        for each in held.values():
            each.close()
    return Seen(before, steps, [*map(summary, filter(relevant, drain(uevents)))])


@contextmanager
def kernel_uevents() -> Iterator[socket.socket]:
    """The real kernel's."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_KOBJECT_UEVENT) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind((0, _KERNEL_GROUP))
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


def bind_by_hand(address: str, old: str, new: str) -> tuple[Step, ...]:
    return (
        Write(f"{address}/driver_override", new),
        Write(f"bus/pci/drivers/{old}/unbind", address),
        Write("bus/pci/drivers_probe", address),
    )


_GEN4 = Node(pfs=(Pf(address=PF, services="sym;asym", total_vfs=2, numa_node=0),))
_BARE = Node(pfs=(Pf(address=PF, services="sym;asym", total_vfs=2, num_vfs=0),))


def _words(path: str, *words: str) -> tuple[Step, ...]:
    return tuple(Write(path, word) for word in words)


CASES: Final[dict[str, Case]] = {
    "to vfio-pci and back": Case(
        _GEN4,
        (PF, VF, VF2),
        (
            *bind_by_hand(VF, "4xxxvf", "vfio-pci"),
            Write(f"{VF}/driver_override", "\n"),
            Write("bus/pci/drivers/vfio-pci/unbind", f"{VF}\n"),
            Write("bus/pci/drivers_probe", f"{VF}\n"),
        ),
    ),
    "bind, unbind, probe": Case(
        _GEN4,
        (VF, VF2),
        (
            Write("bus/pci/drivers/vfio-pci/bind", VF),
            Write("bus/pci/drivers/4xxxvf/bind", VF),
            Write("bus/pci/drivers/vfio-pci/unbind", VF),
            Write("bus/pci/drivers/4xxxvf/unbind", "0000:6b:1f.7"),
            Write("bus/pci/drivers/4xxxvf/unbind", VF),
            Write("bus/pci/drivers/4xxxvf/unbind", VF),
            Write("bus/pci/drivers/vfio-pci/bind", VF),
            Write("bus/pci/drivers_probe", "0000:6b:1f.7"),
            Write("bus/pci/drivers_probe", VF2),
            Write("bus/pci/drivers/4xxxvf/bind", VF),
            Write("bus/pci/drivers/4xxxvf/bind", "nonsense"),
            Write("bus/pci/drivers_probe", ""),
        ),
    ),
    "driver_override's words": Case(
        _GEN4,
        (VF,),
        (
            *_words(
                f"{VF}/driver_override", "vfio-pci", "", "x\n", "two words", "no-such-driver", "v" * 4095, "v" * 5000
            ),
            Write(f"{VF}/driver_override", "no-such-driver\n"),
            Write("bus/pci/drivers/4xxxvf/unbind", VF),
            Write("bus/pci/drivers_probe", VF),
            Write("bus/pci/drivers/4xxxvf/bind", VF),
            *_words(f"{VF}/driver_override", "\0", "4xxxvf"),
            Write("bus/pci/drivers_probe", VF),
            Write(f"{VF}/driver_override", "\n"),
        ),
    ),
    "new_id and remove_id": Case(
        _GEN4,
        (VF, VF2),
        (
            Write("bus/pci/drivers/4xxxvf/unbind", VF),
            Write("bus/pci/drivers/vfio-pci/new_id", "8086"),
            Write("bus/pci/drivers/vfio-pci/new_id", "8086 4941"),
            Write("bus/pci/drivers/vfio-pci/new_id", "8086 4941"),
            Write("bus/pci/drivers/vfio-pci/remove_id", "8086 4941"),
            Write("bus/pci/drivers/vfio-pci/remove_id", "8086 4941"),
        ),
    ),
    "sriov_numvfs": Case(
        _BARE,
        (PF, VF, VF2),
        _words(
            f"{PF}/sriov_numvfs", "x", "-1", "", "3", "0", "1", "1", "2", "2", "0x0", "0", "2 ", "2\n\n", "0\n", "65536"
        ),
    ),
    "sriov_drivers_autoprobe": Case(
        _BARE,
        (PF, VF, VF2),
        (
            *_words(f"{PF}/sriov_drivers_autoprobe", "maybe", "n", "0"),
            Write(f"{PF}/sriov_numvfs", "2"),
            Write("bus/pci/drivers_probe", VF),
            Write("bus/pci/drivers/4xxxvf/bind", VF),
            Write(f"{VF}/driver_override", "vfio-pci"),
            Write("bus/pci/drivers_probe", VF),
            Write(f"{PF}/sriov_drivers_autoprobe", "Y"),
            Write("bus/pci/drivers_probe", VF2),
            Write("bus/pci/drivers_autoprobe", "0"),
            Write("bus/pci/drivers_autoprobe", "1"),
        ),
    ),
    "qat/state": Case(
        _GEN4,
        (PF, VF),
        (
            *_words(f"{PF}/qat/state", "up", "sideways", "DOWN", "down", "down\n", "", "up\n", "up"),
            Write(f"{PF}/sriov_numvfs", "2"),
            Write(f"{PF}/qat/state", "down"),
            Write(f"{PF}/sriov_numvfs", "0"),
            Write(f"{PF}/qat/state", "down"),
            Write(f"{PF}/sriov_numvfs", "2"),
        ),
    ),
    "qat/cfg_services": Case(
        _BARE,
        (PF,),
        (
            Write(f"{PF}/qat/cfg_services", "dc"),
            Write(f"{PF}/qat/cfg_services", "nonsense"),
            Write(f"{PF}/qat/state", "down"),
            *_words(
                f"{PF}/qat/cfg_services", "sym;asym", "asym;sym", "dc;sym\n", "sym;sym", "sym;", "", "dc;dcc", "dcc"
            ),
            *_words(f"{PF}/qat/cfg_services", "asym;sym;dc", "decomp", "sym asym", "SYM", "s" * 200),
            Write(f"{PF}/qat/state", "up"),
        ),
    ),
    "Gen6's services": Case(
        Node(pfs=(Pf(address=GEN6, device="4948", services="sym;asym", total_vfs=1, num_vfs=0),)),
        (GEN6,),
        (
            Write(f"{GEN6}/qat/state", "down"),
            *_words(f"{GEN6}/qat/cfg_services", "decomp;dc;sym", "asym;sym;dc;decomp", "decomp", "dcc;dc"),
            Write(f"{GEN6}/sriov_numvfs", "1"),
        ),
    ),
    "qat/'s other words": Case(
        _BARE,
        (PF,),
        (
            *_words(f"{PF}/qat/auto_reset", "on", "off", "1", "y", "tr", "2", "", "0\n"),
            *_words(f"{PF}/qat/num_rps", "1"),
            *_words(f"{PF}/vendor", "1"),
        ),
    ),
    "before Gen4": Case(
        Node(pfs=(Pf(address=GEN2, device="37c8", services="sym;asym", total_vfs=2),)),
        (GEN2, "0000:3d:01.0", "0000:3d:01.1"),
        (Write(f"{GEN2}/sriov_numvfs", "0"), Write(f"{GEN2}/sriov_numvfs", "1")),
    ),
    "open and closed": Case(
        _GEN4,
        (PF, VF, VF2),
        (
            *bind_by_hand(VF, "4xxxvf", "vfio-pci"),
            *bind_by_hand(VF2, "4xxxvf", "vfio-pci"),
            Open(VF),
            Write(f"{PF}/sriov_numvfs", "1"),
            Write(f"{VF}/driver_override", "\n"),
            Close(VF),
            Open(VF2),
            Close(VF2),
            Write("bus/pci/drivers/vfio-pci/unbind", VF),
        ),
    ),
    **{
        f"{what} while a VF is open": Case(
            _GEN4,
            (PF, VF, VF2),
            (
                *bind_by_hand(VF, "4xxxvf", "vfio-pci"),
                Open(VF),
                Begin(write, VF),
                Write("bus/pci/drivers_probe", VF2),
                Close(VF),
                End(write.path),
            ),
        )
        for what, write in {
            "unbind": Write("bus/pci/drivers/vfio-pci/unbind", VF),
            "sriov_numvfs 0": Write(f"{PF}/sriov_numvfs", "0"),
            "down": Write(f"{PF}/qat/state", "down"),
            "unbinding the PF": Write("bus/pci/drivers/4xxx/unbind", PF),
        }.items()
    },
    "a heartbeat": Case(_BARE, (PF,), (Heartbeat(PF, -1), Heartbeat(PF, 0), Write(f"{PF}/qat/state", "down"))),
    "a PF without its driver": Case(
        _GEN4,
        (PF, VF),
        (
            Write("bus/pci/drivers/4xxx/unbind", PF),
            Write(f"{PF}/sriov_numvfs", "2"),
            Write(f"{PF}/sriov_numvfs", "0"),
            Write("bus/pci/drivers/4xxx/bind", PF),
            Write(f"{PF}/sriov_numvfs", "2"),
        ),
    ),
    "removed and found again": Case(
        Node(pfs=_GEN4.pfs, vfs=(LoneVf(address=LONE, numa_node=0),)),
        (PF, VF, VF2, LONE),
        (
            Write(f"{VF2}/remove", "0"),
            Write(f"{VF2}/remove", "1"),
            Write("bus/pci/rescan", "1"),
            Write(f"{LONE}/remove", "1"),
            Write(f"{PF}/remove", "1"),
            Write("bus/pci/rescan", "0"),
            Write("bus/pci/rescan", "1"),
        ),
    ),
    "nobody's business": Case(
        Node(
            vfs=(LoneVf(address=LONE, numa_node=1),),
            others=(OtherDevice(address="0000:b1:00.0", vendor="8086", device="1572", class_code="0b4000"),),
        ),
        (LONE, "0000:b1:00.0"),
        (
            *bind_by_hand(LONE, "4xxxvf", "vfio-pci"),
            Open(LONE),
            Close(LONE),
            Write("bus/pci/drivers_probe", "0000:b1:00.0"),
        ),
    ),
    "igb_uio": Case(
        Node(pfs=_GEN4.pfs, drivers=("igb_uio", "vfio-pci")),
        (VF,),
        (*bind_by_hand(VF, "4xxxvf", "igb_uio"), *bind_by_hand(VF, "igb_uio", "vfio-pci")),
    ),
}
"""Where the two differ, the emulated kernel is wrong; docs/simulation.md lists what stays different."""
