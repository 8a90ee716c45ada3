"""Misbehaving peers: of another uid, too many, not reading, leaving, coming back."""

import os
import select
import signal
import socket
import threading
from contextlib import suppress

import pytest

from helper_security.chain import interrupted, verified
from helper_security.figures import tried
from qat_shared.codec import encode
from qat_shared.messages import (
    PROTOCOL,
    ErrorCode,
    Failure,
    Heartbeat,
    Hello,
    OpenPodResources,
    ReadHeartbeat,
)
from support.conditions import wait_until
from support.helper_process import PF, Helper, failure, heartbeat, needs_root, run_as_user, wait_until_served
from support.sysfs_tree import address


@needs_root
def test_another_uid_is_turned_away(running: Helper) -> None:
    running.directory.chmod(0o755)
    os.chown(running.socket, -1, 4321)

    def connect() -> None:
        for request in (Hello(id=5, protocol=PROTOCOL, version="x"), b"nonsense"):
            with running.connect(greet=False) as client:
                reply = client.ask(request)
                assert isinstance(reply, Failure)
                assert (reply.code, reply.rule) == (ErrorCode.DENIED, "server-uid")
                assert reply.id == (5 if isinstance(request, Hello) else 0)
                assert client.at_end()

    assert run_as_user(1234, 4321, [connect]) == 0
    refused = [line for line in running.audit_lines() if line["event"] == "refused"]
    assert [(line["peer"]["uid"], line["peer"]["gid"]) for line in refused] == [(1234, 4321)] * 2


@needs_root
def test_strangers_cannot_lock_the_server_out(running: Helper) -> None:
    running.directory.chmod(0o755)
    os.chown(running.socket, -1, 4321)
    release_end, release = os.pipe()
    ready_end, ready = os.pipe()

    def occupy() -> None:
        clients = [running.connect(greet=False) for _ in range(40)]
        os.write(ready, b"x")
        os.close(release)
        os.read(release_end, 1)
        assert clients

    thread = threading.Thread(target=lambda: (run_as_user(1234, 4321, [occupy]), os.write(ready, b"ended")))
    thread.start()
    assert os.read(ready_end, 1) == b"x"
    with running.connect() as client:
        assert isinstance(heartbeat(client), Heartbeat)
    os.close(release)
    thread.join()
    for descriptor in (release_end, ready_end, ready):
        os.close(descriptor)


def test_connections_are_bounded(running: Helper) -> None:
    clients = [running.connect() for _ in range(16)]
    with running.connect(greet=False) as one_more:
        assert failure(one_more.ask(Hello(id=1, protocol=PROTOCOL, version="x")))[1] is ErrorCode.BUSY
        assert one_more.at_end()
    clients.pop().close()
    assert isinstance(heartbeat(clients[0]), Heartbeat)
    with running.connect() as again:
        assert isinstance(heartbeat(again), Heartbeat)
    for client in clients:
        client.close()


def test_a_peer_that_does_not_read_is_dropped_and_others_are_served(running: Helper) -> None:
    with running.connect() as slow, running.connect() as other:
        slow.sock.setblocking(False)
        hello = encode(Hello(id=1, protocol=PROTOCOL, version="x"))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                try:
                    slow.sock.send(hello)
                except BlockingIOError:
                    select.select([], [slow.sock], [], 20)
        assert isinstance(heartbeat(other), Heartbeat)
        assert running.process is not None
        assert running.process.poll() is None


# Peers that leave and come back


def test_a_peer_that_leaves_with_operations_in_flight_finds_its_devices_when_it_is_back(running: Helper) -> None:
    status = running.heartbeat
    status.unlink()
    os.mkfifo(status)
    with running.connect() as witness:
        descriptors = running.open_files()
        for _ in range(5):
            with running.connect() as client:
                client.send(ReadHeartbeat(id=1, address=address(PF)))
                client.send(ReadHeartbeat(id=1, address=address(PF)))
                assert failure(client.receive())[1] is ErrorCode.BUSY, (
                    "the second: it was read, so the first is at work"
                )
        assert len(running.children()) == 1, "the abandoned operation does not begin again"
        with running.connect() as client:
            assert failure(heartbeat(client))[1] is ErrorCode.BUSY, "its child is still running"
            status.open("w").close()
            wait_until(lambda: not running.children())
            status.unlink()
            status.write_text("0\n")
            reply = heartbeat(client, 2)
            assert isinstance(reply, Heartbeat)
            assert reply.id == 2, "it receives no reply to the earlier peer's request"
        wait_until(lambda: running.is_idle() and running.open_files() == descriptors)
        assert isinstance(heartbeat(witness), Heartbeat)


def test_a_peer_that_is_killed_in_the_middle_leaves_what_was_begun_audited(running: Helper) -> None:
    """It has 64 requests in flight. Queued ones do not begin any more, and each has its last line in the log."""
    begin_end, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        with running.connect() as client:
            for number in range(64):
                client.send(OpenPodResources(id=number, wait_ms=300))
            os.write(begin, b"x")
            signal.pause()
    os.read(begin_end, 1)
    os.close(begin_end)
    os.close(begin)
    wait_until(lambda: len(running.audit_lines()) > 60)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: not interrupted(verified(running.audit)))
    ends = [line["result"]["message"] for line in verified(running.audit) if line["event"] == "done"]
    assert len(ends) == 64
    assert sum("disconnected before the operation began" in message for message in ends) > 40
    with running.connect() as client:
        assert isinstance(heartbeat(client), Heartbeat)


def test_half_a_connection_is_the_end_of_it(running: Helper) -> None:
    with running.connect() as witness:
        for how in (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR):
            for _ in range(30):
                with running.connect() as client:
                    client.send(ReadHeartbeat(id=1, address=address(PF)))
                    client.sock.shutdown(how)
                    with suppress(BrokenPipeError, ConnectionResetError):
                        for _ in range(20):  # it is no longer read, or read without a reply
                            client.send(ReadHeartbeat(id=1, address=address(PF)))
                    if how is not socket.SHUT_RD:
                        wait_until(client.at_end)
        wait_until_served(witness)
        tried("half-open connections", 90)
