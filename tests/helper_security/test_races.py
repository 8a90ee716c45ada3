"""The tree changes between the helper's look and its write: links are swapped, devices replaced, drivers moved.

Nobody but the kernel can do this in a real sysfs. Here somebody can, as fast as a thread goes, and still every write
that the helper makes, as the kernel sees it, is one of the three that its table allows, about the device asked for.
"""

import ctypes
import os
import random
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from emulated import PF, VF, emulated
from helper_process import COMMAND, Client, wait_until
from helper_security import hostile
from helper_security.chain import interrupted, verified
from helper_security.figures import tried, wanted
from helper_security.writes import Write, Writes
from qat_server.simulation.kernel import Kernel
from qat_server.simulation.node import Node, OtherDevice, Pf
from qat_shared.messages import AnyReply, BindDriver, Bound, DpdkDriver, ErrorCode, Failure, ReleaseDriver
from qat_shared.pci import PciAddress

OPERATIONS = wanted("QAT_RACE_OPERATIONS", 200)
ADDRESS = PciAddress.parse(VF)
NIC = "0000:00:07.0"
NODE = Node(
    pfs=(Pf(address=PF, device="4940", services="dc", total_vfs=2),),
    others=(OtherDevice(address=NIC, vendor="8086", device="1572", driver="vfio-pci"),),
)
DEVICE = f"devices/pci0000:6b/{VF}"
DRIVERS = "bus/pci/drivers"
REFUSALS = (ErrorCode.KERNEL, ErrorCode.VANISHED, ErrorCode.DENIED, ErrorCode.UNAVAILABLE, ErrorCode.BUSY)
# What is replaced by a link, and what that leads to: None stands for the same place in a copy of the whole tree.
SWAPS: dict[str, tuple[str, str | None]] = {
    "the device's link to a copy of it elsewhere": (f"bus/pci/devices/{VF}", None),
    "the device's link to another device": (f"bus/pci/devices/{VF}", f"../../../devices/pci0000:00/{NIC}"),
    "the device's link to another with its name": (f"bus/pci/devices/{VF}", f"../../../devices/pci0000:00/{VF}"),
    "the device's directory": (DEVICE, None),
    "its root bus": ("devices/pci0000:6b", None),
    "its override": (f"{DEVICE}/driver_override", None),
    "its override to another device's": (f"{DEVICE}/driver_override", f"../../pci0000:00/{NIC}/driver_override"),
    "its driver to a stranger": (f"{DEVICE}/driver", f"../../../{DRIVERS}/nvme"),
    "its driver to the one wanted": (f"{DEVICE}/driver", f"../../../{DRIVERS}/./vfio-pci"),
    "its driver to a name with a path": (f"{DEVICE}/driver", "../../../../../etc/passwd"),
    "vfio-pci": (f"{DRIVERS}/vfio-pci", None),
    "its kernel driver": (f"{DRIVERS}/4xxxvf", None),
    "its kernel driver to another": (f"{DRIVERS}/4xxxvf", "vfio-pci"),
    "unbind": (f"{DRIVERS}/4xxxvf/unbind", None),
    "unbind to bind": (f"{DRIVERS}/4xxxvf/unbind", "bind"),
    "drivers_probe": ("bus/pci/drivers_probe", None),
    "drivers_probe to rescan": ("bus/pci/drivers_probe", "rescan"),
    "all drivers": (DRIVERS, None),
    "the bus": ("bus/pci", None),
    "all buses": ("bus", None),
}


class Attacked:
    """A helper on a tree that an attacker may change, beside a copy of it that nothing may be written to."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.root = kernel.sysfs_root
        self.run = self.root.parent / "run"
        self.run.mkdir()
        self.outside = self.run / "outside"
        shutil.copytree(self.root, self.outside, symlinks=True)
        shutil.copytree(self.root / f"devices/pci0000:00/{NIC}", self.root / f"devices/pci0000:00/{VF}", symlinks=True)
        self.parked = kernel.roots[1] / "parked"
        self.audit = self.run / "audit.jsonl"
        self.checked = 0
        self.writes = Writes(kernel, self.run)
        options = [
            f"--sysfs-root={self.root}",
            f"--kubelet-dir={self.run}",
            f"--socket={self.run / 'h.sock'}",
            f"--server-uid={os.geteuid()}",
            f"--server-gid={os.getegid()}",
            f"--audit-log={self.audit}",
        ]
        with (self.run / "log").open("ab") as log:
            self.process = self.writes.spawn([COMMAND, *options], stderr=log)
        wait_until(lambda: b"serving on" in (self.run / "log").read_bytes())
        self.client = Client(self.run / "h.sock")

    def bind(self, driver: DpdkDriver = DpdkDriver.VFIO_PCI) -> AnyReply:
        return self.client.ask(BindDriver(id=1, address=ADDRESS, driver=driver))

    def release(self) -> AnyReply:
        return self.client.ask(ReleaseDriver(id=2, address=ADDRESS))

    def swap(self, kind: str) -> None:
        """Put the link where the real thing is, in one step, and the real thing aside."""
        place, target = SWAPS[kind]
        self.parked.symlink_to(target or self.outside / place)
        exchange(self.root / place, self.parked)

    def swap_back(self, kind: str) -> None:
        """Undo it, unless the kernel has made the thing anew or taken it away meanwhile."""
        place, target = SWAPS[kind]
        path = self.root / place
        if path.is_symlink() and os.readlink(path) == str(target or self.outside / place):
            exchange(path, self.parked)
        self.parked.unlink()

    def sysfs_writes(self) -> list[Write]:
        """Those that are neither to the audit log nor to standard error."""
        return [write for write in self.writes.seen if write[0] not in (str(self.audit), str(self.run / "log"))]

    def check(self) -> None:
        """No write since the last look was outside the table."""
        allowed = {
            f"{self.root}/{DEVICE}/driver_override": {b"vfio-pci", b"igb_uio", b"\n"},
            f"{self.root}/{DRIVERS}/4xxxvf/unbind": {VF.encode()},
            f"{self.root}/{DRIVERS}/vfio-pci/unbind": {VF.encode()},
            f"{self.root}/{DRIVERS}/igb_uio/unbind": {VF.encode()},
            f"{self.root}/bus/pci/drivers_probe": {VF.encode()},
        }
        for path, data in self.sysfs_writes()[self.checked :]:
            self.checked += 1
            assert any(data in allowed.get(place, ()) for place in self.places(path)), (path, data)
        assert self.kernel.snapshot()[PciAddress.parse(NIC)].driver == "vfio-pci", "nobody else's device"
        assert self.process.poll() is None

    def places(self, path: str) -> list[str]:
        """Where in the tree it was: itself, or if it is aside by now, where it may have come from."""
        aside = path.removeprefix(str(self.parked))
        if aside != path:
            return [f"{self.root}/{place}{aside}" for place, _ in SWAPS.values()]
        removed = re.sub(rf"^{self.kernel.roots[1]}/[0-9]+/", f"{self.root}/{DEVICE}/", path)  # a VF that went away
        return [removed]


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step (renameat2, RENAME_EXCHANGE)."""
    if ctypes.CDLL(None, use_errno=True).renameat2(-100, bytes(one), -100, bytes(other), 2) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one))


@contextmanager
def attacked() -> Iterator[Attacked]:
    with emulated(NODE) as kernel:
        on = Attacked(kernel)
        try:
            yield on
            on.check()
            lines = verified(on.audit)
            assert not interrupted(lines)
        finally:
            on.client.close()
            on.process.kill()
            on.process.wait()
            on.writes.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Attacked]:
    """One for all swaps at a chosen moment: each leaves everything as it was."""
    with attacked() as on:
        yield on


def outcome(reply: AnyReply) -> str:
    assert isinstance(reply, Bound | Failure)
    if isinstance(reply, Failure):
        assert reply.code in REFUSALS, reply
        return "refused"
    return "done"


class Moment:
    """Swaps once the helper has made so many writes (0: now), and back when it ends."""

    def __init__(self, on: Attacked, kind: str, writes: int) -> None:
        self.on = on
        self.kind = kind
        self.left = writes
        self.swapped = False
        on.writes.made = self.made
        if writes == 0:
            self.swap()

    def made(self, write: Write) -> None:
        self.left -= 1
        if self.left == 0:
            with self.on.kernel.frozen():
                self.swap()

    def swap(self) -> None:
        if os.path.lexists(self.on.root / SWAPS[self.kind][0]):  # the driver's link, while there is no driver
            self.on.swap(self.kind)
            self.swapped = True

    def end(self) -> None:
        self.on.writes.made = lambda write: None
        if self.swapped:
            self.on.swap_back(self.kind)
            tried("swaps at a chosen moment")


@pytest.mark.parametrize("kind", SWAPS)
def test_swapped_after_each_step(shared: Attacked, kind: str) -> None:
    """Before the operation, and after each of its writes, before the helper knows that it was made."""
    on = shared
    for operation in (on.bind, on.release):
        for step in range(4):
            if operation == on.release:
                assert isinstance(on.bind(), Bound)
            moment = Moment(on, kind, step)
            outcome(operation())
            moment.end()
            on.check()
            assert isinstance(on.bind(), Bound), "nothing is left behind"
            assert isinstance(on.release(), Bound)
            assert on.kernel.driver(VF) == "4xxxvf"


class Swapper(threading.Thread):
    """Swaps as fast as it can. While something is swapped, the emulated kernel waits, the helper does not."""

    def __init__(self, on: Attacked, dice: random.Random) -> None:
        super().__init__()
        self.on = on
        self.dice = dice
        self.swaps: Counter[str] = Counter()
        self.stopping = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        kinds = list(SWAPS)
        try:
            while not self.stopping.is_set():
                kind = self.dice.choice(kinds)
                with self.on.kernel.frozen():
                    if not os.path.lexists(self.on.root / SWAPS[kind][0]):
                        continue  # the driver's link, while there is no driver
                    self.on.swap(kind)
                    until = time.perf_counter() + self.dice.random() * 0.002
                    while time.perf_counter() < until:
                        pass
                    self.on.swap_back(kind)
                self.swaps[kind] += 1
                time.sleep(self.dice.random() * 0.001)
        except OSError as error:
            self.error = error


def test_swapped_all_the_time_by_a_thread() -> None:
    seed, dice = hostile.seeded()
    with attacked() as on:
        outcomes: Counter[str] = Counter()
        swapper = Swapper(on, random.Random(seed))  # noqa: S311
        swapper.start()
        try:
            for _ in range(OPERATIONS):
                operation = dice.choice((on.bind, on.release, lambda: on.bind(DpdkDriver.IGB_UIO)))
                outcomes[outcome(operation())] += 1
        finally:
            swapper.stopping.set()
            swapper.join()
        assert swapper.error is None, f"seed {seed}"
        assert isinstance(on.release(), Bound)
        assert isinstance(on.bind(), Bound), "nothing is left behind"
        tried("swaps by a thread", swapper.swaps.total())
        tried("operations under swaps by a thread", OPERATIONS)
        tried("operations under swaps by a thread that were refused", outcomes["refused"])
        tried("writes seen under swaps by a thread", len(on.sysfs_writes()))


def test_the_device_goes_and_comes_back_all_the_time() -> None:
    """Its PF takes its VFs away and makes them anew while they are bound and released."""
    with attacked() as on:
        stopping = threading.Event()
        rounds = 0

        def replug() -> None:
            nonlocal rounds
            while not stopping.is_set():
                on.kernel.set_numvfs(PF, 0)
                on.kernel.set_numvfs(PF, 2)
                rounds += 1
                time.sleep(0.002)

        thread = threading.Thread(target=replug)
        thread.start()
        try:
            for _ in range(OPERATIONS // 4):
                outcome(on.bind())
                outcome(on.release())
        finally:
            stopping.set()
            thread.join()
        assert isinstance(on.bind(), Bound)
        tried("devices removed and made anew", rounds)
