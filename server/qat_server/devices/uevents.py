"""Puts the devices that the kernel's uevents name into the change queue.

A uevent is only a hint: the server then reads sysfs again, so a lost, doubled or forged one does no harm. Packets have
the format of the kernel's lib/kobject_uevent.c: `bind@/devices/...`, then KEY=value strings, each ended by NUL.
"""

import asyncio
import contextlib
import errno
import os
import socket
from typing import Final

from msgspec import Struct

from qat_server import logs
from qat_server.devices.change_queue import ChangeQueue
from qat_shared.pci import PciAddress

log = logs.get(__name__)

_NETLINK_KOBJECT_UEVENT: Final = 15
_KERNEL_GROUP: Final = 1
_PACKET_LIMIT: Final = 16 * 1024  # the kernel's own is 2 KiB of environment
_RECEIVE_BUFFER: Final = 1024 * 1024  # binding 1024 VFs at once gives some 3000 packets


class Uevent(Struct, frozen=True):
    """One uevent: the action (add, remove, bind, unbind, change) and the PCI device, None for other subsystems."""

    action: str
    subsystem: str
    address: PciAddress | None


def parse(packet: bytes) -> Uevent | None:
    """Parse a packet; None if it is not a kernel uevent (udevd's own packets begin with "libudev")."""
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


class UeventListener:
    """Puts the devices that uevents name into `queue`. `source` is "netlink", or "unix:PATH" on a simulated node.

    `received` and `overruns` count for the metrics. `error` is why there are no uevents, "" while there are.
    """

    def __init__(self, source: str, queue: ChangeQueue) -> None:
        self._source = source
        self._queue = queue
        self.received = 0
        self.overruns = 0
        self.error = ""

    async def run(self) -> None:
        """Listen until cancelled. A source that cannot be opened is logged once and retried every two seconds."""
        while True:
            try:
                sock = await self._open()
            except OSError as error:
                why = f"{self._source}: {os.strerror(error.errno or 0)}"
                if why != self.error:
                    log.warning("no uevents: changes are seen only at the next resync", why=why)
                self.error = why
                await asyncio.sleep(2)
                continue
            self.error = ""
            with contextlib.closing(sock):
                self._queue.rescan()  # there may have been changes before the socket was open
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
                if error.errno == errno.ENOBUFS:  # the kernel dropped packets: read every device again
                    self.overruns += 1
                    self._queue.rescan()
                    continue
                packet, sender = b"", None
            if not packet:
                if not ended.done():
                    ended.set_result(None)
                return
            # Any process with CAP_NET_ADMIN can send on netlink; the kernel sends from port 0.
            if isinstance(sender, tuple) and sender[0] != 0:
                continue
            self._handle(parse(packet))

    def _handle(self, event: Uevent | None) -> None:
        if event is None:
            return
        if event.subsystem == "pci" and event.address is not None:
            self.received += 1
            self._queue.rescan(event.address)
        elif event.subsystem in ("drivers", "module", "uio", "iommu"):  # a driver was added or removed
            self.received += 1
            self._queue.rescan()
