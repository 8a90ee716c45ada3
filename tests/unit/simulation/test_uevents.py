"""The uevent socket: the kernel's format, every client gets everything, a client that does not read is dropped."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat_server.devices.uevents import Uevent, parse
from qat_shared.pci import PciAddress
from qat_simulation.kernel.uevents import Broadcaster, packet
from support.conditions import wait_until

FIELDS = ["DRIVER=vfio-pci", "PCI_CLASS=B4000", "PCI_ID=8086:4941", "PCI_SLOT_NAME=0000:6b:00.1"]


@pytest.fixture
def broadcaster() -> Iterator[Broadcaster]:
    directory = tempfile.mkdtemp(prefix="qat-", dir="/tmp")
    made = Broadcaster(Path(directory) / "uevents.sock")
    yield made
    made.close()
    shutil.rmtree(directory)


def client(broadcaster: Broadcaster) -> socket.socket:
    known = len(broadcaster._clients)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(120)
    made.connect(str(broadcaster.path))
    wait_until(lambda: len(broadcaster._clients) > known)
    return made


def test_packet_is_the_kernel_s() -> None:
    made = packet("bind", "/devices/pci0000:6b/0000:6b:00.1", "pci", FIELDS, 4711)
    assert made == (
        b"bind@/devices/pci0000:6b/0000:6b:00.1\0ACTION=bind\0DEVPATH=/devices/pci0000:6b/0000:6b:00.1\0"
        b"SUBSYSTEM=pci\0DRIVER=vfio-pci\0PCI_CLASS=B4000\0PCI_ID=8086:4941\0PCI_SLOT_NAME=0000:6b:00.1\0SEQNUM=4711\0"
    )
    assert parse(made) == Uevent("bind", "pci", PciAddress.parse("0000:6b:00.1"))


def test_each_client_gets_each_packet_once_in_order(broadcaster: Broadcaster) -> None:
    with client(broadcaster) as one, client(broadcaster) as other:
        for action in ("unbind", "bind"):
            broadcaster.send(action, "/devices/x", "pci", FIELDS)
        for sock in (one, other):
            assert [sock.recv(9999).partition(b"@")[0] for _ in range(2)] == [b"unbind", b"bind"]


def test_client_that_does_not_read_is_dropped_and_blocks_no_other(broadcaster: Broadcaster) -> None:
    with client(broadcaster) as lazy, client(broadcaster) as keen:
        sent = 0
        while not broadcaster.overruns:
            broadcaster.send("change", "/devices/x", "pci", FIELDS)
            sent += 1
            keen.recv(9999)
        received = 0
        while lazy.recv(9999):
            received += 1
        assert received == sent - 1
        broadcaster.send("bind", "/devices/x", "pci", FIELDS)
        assert keen.recv(9999).startswith(b"bind@")


def test_client_that_disconnected_is_dropped(broadcaster: Broadcaster) -> None:
    client(broadcaster).close()
    broadcaster.send("bind", "/devices/x", "pci", FIELDS)
    assert broadcaster._clients == []


def test_close_ends_connections(broadcaster: Broadcaster) -> None:
    with client(broadcaster) as sock:
        broadcaster.close()
        assert sock.recv(9999) == b""
        assert not broadcaster.path.exists()
