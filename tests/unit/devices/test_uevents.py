"""Uevents: the kernel's packets are parsed, and the devices that they name are put into the change queue."""

import asyncio
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_server.devices.change_queue import ChangeQueue
from qat_server.devices.uevents import Uevent, UeventListener, parse
from qat_shared.pci import PciAddress

VF = PciAddress.parse("0000:6b:00.1")
BIND = (
    b"bind@/devices/pci0000:6b/0000:6b:00.1\0ACTION=bind\0DEVPATH=/devices/pci0000:6b/0000:6b:00.1\0SUBSYSTEM=pci\0"
    b"DRIVER=vfio-pci\0PCI_CLASS=B4000\0PCI_ID=8086:4941\0PCI_SUBSYS_ID=8086:0000\0PCI_SLOT_NAME=0000:6b:00.1\0"
    b"MODALIAS=pci:v00008086d00004941sv00008086sd00000000bc0Bsc40i00\0SEQNUM=1034\0"
)
PACKETS = [
    ("a VF is bound", BIND, Uevent("bind", "pci", VF)),
    ("a wide domain", BIND.replace(b"0000:6b", b"10000:6b"), Uevent("bind", "pci", PciAddress(0x10000, 0x6B, 0, 1))),
    (
        "a driver is loaded",
        b"add@/bus/pci/drivers/vfio-pci\0ACTION=add\0DEVPATH=/bus/pci/drivers/vfio-pci\0SUBSYSTEM=drivers\0SEQNUM=9\0",
        Uevent("add", "drivers", None),
    ),
    ("udevd's own packet", b"libudev\0\xfe\xed\xca\xfe and binary", None),
    ("nothing", b"", None),
    ("no action", b"bind@/devices/x\0SUBSYSTEM=pci\0", None),
    ("an address that is none", BIND.replace(b"SLOT_NAME=0000:6b", b"SLOT_NAME=zzzz:6b"), None),
    ("not text", BIND.replace(b"ACTION=bind", b"ACTION=\xff\xfe"), None),
]


@pytest.mark.parametrize(("packet", "expected"), [row[1:] for row in PACKETS], ids=[row[0] for row in PACKETS])
def test_parse(packet: bytes, expected: Uevent | None) -> None:
    assert parse(packet) == expected


@given(st.binary(max_size=300))
def test_parse_takes_any_bytes(packet: bytes) -> None:
    parse(packet)
    parse(b"add@/x\0" + packet)


@pytest.fixture
def kernel() -> Iterator[socket.socket]:
    """A listening socket that stands for the emulated kernel's."""
    with (
        tempfile.TemporaryDirectory(prefix="qat-", dir="/tmp") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening,
    ):
        listening.bind(str(Path(directory) / "uevents.sock"))
        listening.listen()
        listening.setblocking(False)
        yield listening


async def test_the_listener_queues_devices_and_reconnects(kernel: socket.socket) -> None:
    queue = ChangeQueue()
    listener = UeventListener(f"unix:{kernel.getsockname()}", queue)
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(listener.run())
    try:
        connection, _ = await asyncio.wait_for(loop.sock_accept(kernel), 120)
        with connection:
            assert await asyncio.wait_for(queue.next(), 120) is None, "earlier changes may have been missed"
            await loop.sock_sendall(connection, BIND)
            assert await asyncio.wait_for(queue.next(), 120) == frozenset({VF})
        again, _ = await asyncio.wait_for(loop.sock_accept(kernel), 120)
        again.close()
        assert await asyncio.wait_for(queue.next(), 120) is None, "changes in between may have been missed"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert listener.received == 1


async def test_netlink_needs_no_privilege() -> None:
    queue = ChangeQueue()
    task = asyncio.create_task((listener := UeventListener("netlink", queue)).run())
    try:
        assert await asyncio.wait_for(queue.next(), 120) is None
        assert listener.error == ""
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
