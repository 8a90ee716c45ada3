"""The uevents that the emulated kernel sends, over its socket."""

import os
import socket
from collections.abc import Iterator

import pytest

from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import Node, Pf
from support.conditions import wait_until
from support.emulated_kernel import PF, VF, VF2, attribute, emulated

NODE = Node(pfs=(Pf(address=PF, total_vfs=4, vf_driver="vfio-pci"), Pf(address="0001:6b:00.0", total_vfs=4)))


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with emulated(NODE) as made:
        yield made


def listen(kernel: Kernel) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(120)
    sock.connect(str(kernel.uevents_path))
    wait_until(lambda: kernel._uevents._clients)
    return sock


def steps(sock: socket.socket, count: int) -> list[str]:
    """The actions and names of the next uevents."""
    heads = [sock.recv(9999).partition(b"\0")[0].decode() for _ in range(count)]
    return [f"{head.partition('@')[0]} {head.rpartition('/')[2]}" for head in heads]


def test_uevents_of_a_rebinding(kernel: Kernel) -> None:
    vf = "0001:6b:00.1"
    with listen(kernel) as sock:
        kernel.set_driver_override(vf, "vfio-pci")
        kernel.unbind(vf)
        kernel.probe(vf)
        packets = [sock.recv(9999) for _ in range(3)]
    group = os.readlink(kernel.sysfs_root / attribute(vf, "iommu_group")).rpartition("/")[2]
    path = f"/devices/pci0001:6b/{vf}"
    ids = "PCI_CLASS=B4000\0PCI_ID=8086:4941\0PCI_SUBSYS_ID=8086:0000\0"
    ids += f"PCI_SLOT_NAME={vf}\0MODALIAS=pci:v00008086d00004941sv00008086sd00000000bc0Bsc40i00\0"
    sequence = int(packets[0].rpartition(b"SEQNUM=")[2].rstrip(b"\0"))
    assert [packet.decode() for packet in packets] == [
        f"unbind@{path}\0ACTION=unbind\0DEVPATH={path}\0SUBSYSTEM=pci\0{ids}SEQNUM={sequence}\0",
        f"add@/devices/virtual/vfio/{group}\0ACTION=add\0DEVPATH=/devices/virtual/vfio/{group}\0SUBSYSTEM=vfio\0"
        f"DEVNAME=vfio/{group}\0SEQNUM={sequence + 1}\0",
        f"bind@{path}\0ACTION=bind\0DEVPATH={path}\0SUBSYSTEM=pci\0DRIVER=vfio-pci\0{ids}SEQNUM={sequence + 2}\0",
    ]


def test_uevents_of_vfs_that_are_enabled_and_disabled() -> None:
    with emulated(Node(pfs=(Pf(address=PF, total_vfs=2, num_vfs=0),))) as kernel, listen(kernel) as sock:
        kernel.set_numvfs(PF, 2)
        one = [f"{action} {VF}" for action in ("add", "change", "bind")]
        two = [f"{action} {VF2}" for action in ("add", "change", "bind")]
        assert steps(sock, 7) == [*one, *two, f"change {PF}"]
        kernel.set_numvfs(PF, 0)
        assert steps(sock, 4) == [f"unbind {VF}", f"remove {VF}", f"unbind {VF2}", f"remove {VF2}"]


def test_uevents_of_a_driver(kernel: Kernel) -> None:
    with listen(kernel) as sock:
        kernel.remove_driver("igb_uio")
        assert steps(sock, 2) == ["remove igb_uio", "remove igb_uio"]
        kernel.add_driver("igb_uio")
        assert steps(sock, 2) == ["add igb_uio", "add igb_uio"]
