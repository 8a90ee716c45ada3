"""Descriptors passed to the helper, which wants none, and by it to a peer that does not receive them."""

import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import msgspec
import pytest

from helper_security.chain import interrupted
from qat_helper.passed import MAX_OPEN
from qat_helper.serve import MAX_PASSED
from qat_shared.codec import decode_reply
from qat_shared.messages import MAX_MESSAGE, Connected, Heartbeat, OpenPodResources
from support.conditions import wait_until
from support.helper_process import Helper, heartbeat, helper

GOOD = {"op": "ReadHeartbeat", "id": 1, "address": [0, 0x6B, 0, 0]}
OLD_KERNEL = """
import sys
from qat_helper import listening, main
listening.SO_PASSRIGHTS = -1  # as before Linux 6.16, where peers cannot be prevented from passing descriptors
sys.exit(main.main())
"""


def lingering(seconds: int) -> socket.socket:
    """A connection whose last close takes that long."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        server.bind(("127.0.0.1", 0))
        server.listen()
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    LINGERING.append(peer)
    return sock


def pass_on(through: socket.socket, descriptor: socket.socket, before: Sequence[bytes]) -> None:
    """Pass it from a process that exits at once, so that no close in this process is the last one and blocks.

    With packets before it, the helper has not received it when this process has closed its copy.
    """
    go_end, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(go)
            os.read(go_end, 1)  # the other process has closed its copy
            for packet in before:
                through.send(packet)
            socket.send_fds(through, [b"nonsense"], [descriptor.fileno()])
        finally:
            os._exit(0)
    descriptor.close()
    os.close(go_end)
    os.close(go)
    os.waitpid(pid, 0)


LINGERING: list[socket.socket] = []
BEFORE = ("read", "left unread", "behind empty packets", "behind more of them")


@pytest.mark.parametrize("old_kernel", [False, True], ids=["this kernel", "an old kernel"])
@pytest.mark.parametrize("before_it", [[], [b"nonsense"] * 5, [b""] * 2, [b""] * 5], ids=BEFORE)
def test_a_passed_descriptor_that_closes_slowly_holds_nobody_up(old_kernel: bool, before_it: list[bytes]) -> None:
    with helper(start=False) as running:
        if old_kernel:
            running.command = [sys.executable, "-c", OLD_KERNEL]
        running.start()
        with running.connect() as victim:
            assert isinstance(heartbeat(victim), Heartbeat)
            before = running.open_files_when_idle(victim)
            slow = lingering(300)
            assert running.process is not None
            with running.connect() as client:
                running.process.send_signal(signal.SIGSTOP)  # it holds the last copy when it continues
                pass_on(client.sock, slow, before_it)
                if before_it:
                    client.close()
                running.process.send_signal(signal.SIGCONT)
            began = time.monotonic()
            for _ in range(20):
                assert isinstance(heartbeat(victim), Heartbeat)
            assert time.monotonic() - began < 120, "nothing waits for it"
            wait_until(lambda: running.open_files() == before)
    while LINGERING:
        LINGERING.pop().close()


@pytest.mark.parametrize("old_kernel", [False, True], ids=["this kernel", "an old kernel"])
def test_passed_descriptors_do_not_stay_open(old_kernel: bool) -> None:
    with helper(start=False) as running:
        if old_kernel:
            running.command = [sys.executable, "-c", OLD_KERNEL]
        running.start()
        with running.connect() as client:
            heartbeat(client)
        wait_until(lambda: running.open_files() > 0)
        with running.connect() as watcher:
            heartbeat(watcher)
            before = running.open_files_when_idle(watcher)
            pipe_end, pipe = os.pipe()
            for _ in range(20):
                with running.connect() as client, suppress(PermissionError):
                    socket.send_fds(client.sock, [msgspec.msgpack.encode(GOOD)], [pipe] * 10)
                    assert client.at_end(), "a peer that passes descriptors is dropped"
            wait_until(lambda: running.open_files() == before)
            os.close(pipe)
            assert os.read(pipe_end, 1) == b"", "no other copy is open"
            os.close(pipe_end)
            assert isinstance(heartbeat(watcher), Heartbeat)


def test_a_new_child_is_not_the_last_to_close_a_descriptor() -> None:
    """As when a peer sends a request, passes a descriptor that closes slowly, and leaves, all at once."""
    with helper(start=False) as running:
        running.command = [sys.executable, "-c", OLD_KERNEL]
        running.start()
        assert running.process is not None
        with running.connect() as victim:
            assert isinstance(heartbeat(victim), Heartbeat)
            for _ in range(20):
                slow = lingering(300)
                with running.connect() as client:
                    running.process.send_signal(signal.SIGSTOP)
                    pass_on(client.sock, slow, [msgspec.msgpack.encode(GOOD)])
                    client.close()
                    running.process.send_signal(signal.SIGCONT)
                wait_until(lambda: isinstance(heartbeat(victim), Heartbeat))  # not busy for as long as the close takes
        wait_until(lambda: not running.children())
    while LINGERING:
        LINGERING.pop().close()


def test_connections_that_a_peer_does_not_take_are_bounded(running: Helper) -> None:
    """Descriptors in transit count against all processes of root without capabilities, not only the helper."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as kubelet, running.connect() as client:
        kubelet.bind(str(running.directory / "kubelet/pod-resources/kubelet.sock"))
        kubelet.listen(1024)
        ask = OpenPodResources(id=1)
        for _ in range(60):
            client.send(ask)
        wait_until(
            lambda: len(running.audit_lines()) > 2 and not interrupted(running.audit_lines()) and not running.children()
        )
        taken = 0
        for _ in range(60):
            packet, descriptors, _, _ = socket.recv_fds(client.sock, MAX_MESSAGE, 4)
            assert isinstance(decode_reply(packet), Connected) == bool(descriptors)
            taken += len(descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
        assert 0 < taken <= MAX_PASSED
        client.send(ask)
        packet, descriptors, _, _ = socket.recv_fds(client.sock, MAX_MESSAGE, 4)
        assert isinstance(decode_reply(packet), Connected), "after they are received, more are passed"
        os.close(descriptors[0])


def test_few_connections_stay_open_whatever_a_peer_keeps(running: Helper) -> None:
    """The kubelet's ends: all but the newest are at their end, and all of them when the peer has left."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as kubelet, ExitStack() as held:
        kubelet.bind(str(running.directory / "kubelet/pod-resources/kubelet.sock"))
        kubelet.listen(64)
        witness, *peers = (held.enter_context(running.connect()) for _ in range(4))
        heartbeat(witness)
        before = running.open_files_when_idle(witness)
        ends: list[socket.socket] = []
        for number in range(30):
            peer = peers[number % len(peers)]
            peer.send(OpenPodResources(id=1))
            _, (descriptor,), _, _ = socket.recv_fds(peer.sock, MAX_MESSAGE, 4)
            held.enter_context(socket.socket(fileno=descriptor))
            ends.append(held.enter_context(kubelet.accept()[0]))
            ends[-1].setblocking(False)
            assert sum(is_open(end) for end in ends) <= MAX_OPEN
            assert is_open(ends[-1]), "the newest"
        for peer in peers:
            peer.close()
        wait_until(lambda: not any(is_open(end) for end in ends))
        wait_until(lambda: running.open_files_when_idle(witness) <= before - len(peers))
        assert isinstance(heartbeat(witness), Heartbeat)


def is_open(end: socket.socket) -> bool:
    try:
        return end.recv(1) != b""
    except BlockingIOError:
        return True
