"""What wakes the server: the kernel's uevents, a timer, and whatever else calls `Changes.mark`.

A wake-up names devices, or asks for a look at everything. Uevents are hints, never facts: each leads to a new look at
sysfs, so a lost, doubled or forged one does no harm. Format of a packet: the kernel's lib/kobject_uevent.c
(`bind@/devices/...` and then KEY=value strings, all ended by NUL).
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Collection
from typing import Final

from msgspec import Struct

from qat_server import logs
from qat_shared.pci import PciAddress

log = logs.get(__name__)

_NETLINK_KOBJECT_UEVENT: Final = 15
_KERNEL_GROUP: Final = 1
_PACKET_LIMIT: Final = 16 * 1024  # the kernel's own is 2 KiB of environment
_RECEIVE_BUFFER: Final = 1024 * 1024  # 1024 VFs bound at once are some 3000 packets
_AGAIN_FIRST: Final = 1.0
_AGAIN_LAST: Final = 60.0
_COALESCE: Final = 0.005  # seconds that a burst is gathered before it is looked at
_COALESCE_MOST: Final = 0.1
_SHARE: Final = 3  # a burst is gathered for so many times as long as the last look took: a thousand VFs make it 20 ms


class Uevent(Struct, frozen=True):
    """One uevent: what happened (add, remove, bind, unbind, change) to which PCI device, if it is one."""

    action: str
    subsystem: str
    address: PciAddress | None


def parse(packet: bytes) -> Uevent | None:
    """Read a packet. None for what is not a kernel uevent (udevd's own packets begin with "libudev")."""
    head, _, rest = packet.partition(b"\0")
    if b"@" not in head:
        return None
    fields = dict(part.split(b"=", 1) for part in rest.split(b"\0") if b"=" in part)
    try:
        action, subsystem = fields[b"ACTION"].decode(), fields.get(b"SUBSYSTEM", b"").decode()
        slot = fields.get(b"PCI_SLOT_NAME", b"").decode()
        address = PciAddress.parse(slot) if slot else None
    except (KeyError, ValueError):
        return None
    return Uevent(action, subsystem, address)


class Changes:
    """What has to be looked at again; gathered until `wait` takes it."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._devices: set[PciAddress] = set()
        self._everything = False
        self._looked_at: float | None = None

    @property
    def pending(self) -> bool:
        """Whether there is something that `wait` has not taken yet."""
        return self._event.is_set()

    def mark(self, address: PciAddress | None = None) -> None:
        """Ask for a look at one device, or at everything."""
        if address is None:
            self._everything = True
        else:
            self._devices.add(address)
        self._event.set()

    def mark_known(self) -> None:
        """Ask for the known devices to be judged anew, without a look at any."""
        self._event.set()

    def mark_or_judge(self, address: PciAddress | None) -> None:
        """`mark` a device, or without one `mark_known`."""
        if address is None:
            self.mark_known()
        else:
            self.mark(address)

    async def wait(self) -> frozenset[PciAddress] | None:
        """The devices to look at (None: everything; empty: none), once there is something; a burst comes as one."""
        loop = asyncio.get_running_loop()
        took = 0.0 if self._looked_at is None else loop.time() - self._looked_at
        await self._event.wait()
        await asyncio.sleep(min(max(_COALESCE, took * _SHARE), _COALESCE_MOST))
        devices = None if self._everything else frozenset(self._devices)
        self._devices.clear()
        self._everything = False
        self._event.clear()
        self._looked_at = loop.time()
        return devices


class Again:
    """Has another look taken at what could not be read: after one second, then twice as long each time, up to a minute.

    No uevent tells that a device or the bus can be read again.
    """

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._pause = _AGAIN_FIRST
        self._timer: asyncio.TimerHandle | None = None

    def look(self, unread: Collection[PciAddress | None]) -> None:
        """A look has ended that could not read these (None: the bus)."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not unread:
            self._pause = _AGAIN_FIRST
            return
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._mark, tuple(unread))

    def _mark(self, unread: Collection[PciAddress | None]) -> None:
        self._timer = None
        self._pause = min(self._pause * 2, _AGAIN_LAST)
        for address in unread:
            self._changes.mark(address)


class UeventListener:
    """Turns uevents into marks on `changes`. `source` is "netlink", or "unix:PATH" on a simulated node."""

    def __init__(self, source: str, changes: Changes) -> None:
        self._source = source
        self._changes = changes
        self.received = 0
        self.overruns = 0
        self.error = ""

    async def run(self) -> None:
        """Listen until cancelled; when the source cannot be had, say so once and try again every few seconds."""
        while True:
            try:
                sock = await self._open()
            except OSError as error:
                why = f"{self._source}: {os.strerror(error.errno or 0)}"
                if why != self.error:
                    log.warning("no uevents: changes are seen at the next resync only", why=why)
                self.error = why
                await asyncio.sleep(2)
                continue
            self.error = ""
            with contextlib.closing(sock):
                self._changes.mark()  # whatever happened before we listened
                await self._listen(sock)

    async def _open(self) -> socket.socket:
        if self._source.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            address: str | tuple[int, int] = self._source.removeprefix("unix:")
        else:
            kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
            sock = socket.socket(socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
            address = (0, _KERNEL_GROUP)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            if isinstance(address, str):
                await asyncio.get_running_loop().sock_connect(sock, address)
            else:
                sock.bind(address)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _listen(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(sock, self._readable, sock, ended)
        try:
            await ended
        finally:
            loop.remove_reader(sock)

    def _readable(self, sock: socket.socket, ended: asyncio.Future[None]) -> None:
        while True:
            try:
                packet, _, _, sender = sock.recvmsg(_PACKET_LIMIT)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # the kernel had to drop some: they may have been ours
                    self.overruns += 1
                    self._changes.mark()
                    continue
                packet, sender = b"", None
            if not packet:
                if not ended.done():
                    ended.set_result(None)
                return
            # On netlink anybody with CAP_NET_ADMIN may send: port 0 is the kernel.
            if isinstance(sender, tuple) and sender[0] != 0:
                continue
            self._take(parse(packet))

    def _take(self, event: Uevent | None) -> None:
        if event is None:
            return
        if event.subsystem == "pci" and event.address is not None:
            self.received += 1
            self._changes.mark(event.address)
        elif event.subsystem in ("drivers", "module", "uio", "iommu"):  # a driver came or went
            self.received += 1
            self._changes.mark()


async def resync(changes: Changes, interval: float) -> None:
    """Ask for a look at everything each `interval` seconds, for what gives no uevent (qat/state, for one)."""
    while True:
        await asyncio.sleep(interval)
        changes.mark()
