"""The real helper process on its real socket: messages, admission, and operations that last."""

import os
import resource
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest

from qat_shared.codec import decode_reply
from qat_shared.messages import (
    MAX_MESSAGE,
    PROTOCOL,
    AnyReply,
    BindDriver,
    Bound,
    Connected,
    Done,
    DpdkDriver,
    ErrorCode,
    Failure,
    Heartbeat,
    Hello,
    KubeletService,
    OpenKubeletSocket,
    PrepareSocketDirectory,
    ReadHeartbeat,
    Welcome,
)
from support.conditions import wait_until
from support.helper_process import PF, VF, VF2, Helper, failure, heartbeat, helper
from support.sysfs_tree import address


@pytest.fixture
def running() -> Iterator[Helper]:
    with helper() as running:
        yield running


# Hello


def test_hello_is_answered_with_versions_and_operations(running: Helper) -> None:
    with running.connect(greet=False) as client:
        reply = client.ask(Hello(id=9, protocol=PROTOCOL, version="x"))
    assert isinstance(reply, Welcome)
    assert (reply.id, reply.protocol) == (9, PROTOCOL)
    assert "BindDriver" in reply.operations
    assert reply.audit.sequence == 1, "the line of the start"


def test_hello_must_come_first(running: Helper) -> None:
    with running.connect(greet=False) as client:
        assert failure(heartbeat(client))[:2] == (1, ErrorCode.PROTOCOL)
        assert isinstance(client.ask(Hello(id=2, protocol=PROTOCOL, version="x")), Welcome)
        assert isinstance(heartbeat(client), Heartbeat)


def test_another_protocol_is_told_both_versions(running: Helper) -> None:
    with running.connect(greet=False) as client:
        number, code, message = failure(client.ask(Hello(id=3, protocol=PROTOCOL + 1, version="9.9.9")))
        assert (number, code) == (3, ErrorCode.PROTOCOL)
        for part in (f"protocol {PROTOCOL} ", f"protocol {PROTOCOL + 1} ", "9.9.9", "install the same version of both"):
            assert part in message
        assert failure(heartbeat(client))[1] is ErrorCode.PROTOCOL, "still no Hello"


# What is no message


GOOD = {"op": "ReadHeartbeat", "id": 1, "address": [0, 0x6B, 0, 0]}


def padded(request: dict[str, object], length: int) -> bytes:
    """A valid request of exactly `length` bytes: msgspec accepts a repeated key."""
    fields = msgspec.msgpack.encode(request)[1:]
    rest = length - 5 - len(fields)
    longer = rest % 4  # entries of five bytes; all others have four
    shorter = (rest - 5 * longer) // 4
    count = len(request) + longer + shorter
    return b"\xdf" + count.to_bytes(4, "big") + fields + b"\xa2id\xcc\x01" * longer + b"\xa2id\x01" * shorter


MALFORMED = {
    "empty": b"",
    "nonsense": b"\xff\x00garbage",
    "truncated": msgspec.msgpack.encode(GOOD)[:-2],
    "unknown type": msgspec.msgpack.encode(GOOD | {"op": "WriteFile"}),
    "extra field": msgspec.msgpack.encode(GOOD | {"path": "/etc/shadow"}),
    "an extra field with a very long name": msgspec.msgpack.encode(GOOD | {"x" * 60_000: 1}),
    "address as text": msgspec.msgpack.encode(GOOD | {"address": "../../etc"}),
    "oversized by one": b"\x00" * (MAX_MESSAGE + 1),
    "oversized": b"\x00" * (3 * MAX_MESSAGE),
    "as long as allowed": b"\x00" * MAX_MESSAGE,
    "a valid message of the allowed length, and more": padded(GOOD, MAX_MESSAGE) + b"\x00",
    "deeply nested": b"\x91" * 60_000,
}


@pytest.mark.parametrize("packet", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_message_is_answered_and_the_connection_stays(running: Helper, packet: bytes) -> None:
    with running.connect() as client:
        number, code, message = failure(client.ask(packet))
        assert (number, code) == (0, ErrorCode.MALFORMED)
        assert message
        assert isinstance(heartbeat(client), Heartbeat)


def test_a_message_of_the_allowed_length_is_accepted(running: Helper) -> None:
    packet = padded(GOOD, MAX_MESSAGE)
    assert len(packet) == MAX_MESSAGE
    with running.connect() as client:
        assert isinstance(client.ask(packet), Heartbeat)


# What is admitted, and how many requests


def test_a_uid_of_the_policy_file_is_admitted_and_narrowed() -> None:
    with helper(start=False) as running:
        policy = running.directory / "policy.toml"
        policy.write_text(f'server_uids = [{os.geteuid()}]\noperations = ["ReadHeartbeat"]\n')
        policy.chmod(0o600)
        running.start("--server-uid=54321", f"--policy={policy}")
        with running.connect(greet=False) as client:
            welcome = client.ask(Hello(id=1, protocol=PROTOCOL, version="x"))
            assert isinstance(welcome, Welcome)
            assert welcome.operations == ("ReadHeartbeat",)
            assert failure(client.ask(PrepareSocketDirectory(id=2)))[1] is ErrorCode.DENIED
            assert isinstance(heartbeat(client), Heartbeat)


def test_many_requests_in_flight_are_all_answered(running: Helper) -> None:
    with running.connect() as client:
        count = 300

        def send() -> None:
            for number in range(count):
                client.send(OpenKubeletSocket(id=number, service=KubeletService.POD_RESOURCES, wait_ms=0))

        thread = threading.Thread(target=send)
        thread.start()
        replies = [client.receive() for _ in range(count)]
        thread.join()
    assert sorted(reply.id for reply in replies) == list(range(count))
    assert {failure(reply)[1] for reply in replies} == {ErrorCode.UNAVAILABLE}


# Operations that last


def test_a_blocked_read_holds_up_nobody_and_no_clean_end(running: Helper) -> None:
    status = running.heartbeat
    status.unlink()
    os.mkfifo(status)
    (running.debugfs / "dev_cfg").write_text("[GENERAL]\n")
    with running.connect() as client, running.connect() as other:
        client.send(ReadHeartbeat(id=1, address=address(PF)))
        wait_until(running.children)
        assert failure(other.ask(ReadHeartbeat(id=2, address=address(PF))))[1] is ErrorCode.BUSY
        assert isinstance(other.ask(PrepareSocketDirectory(id=3)), Done)
        assert failure(client.receive())[:2] == (1, ErrorCode.TIMED_OUT)
        assert failure(client.ask(ReadHeartbeat(id=4, address=address(PF))))[1] is ErrorCode.BUSY, "still at work"
        with status.open("w") as pipe:
            pipe.write("0\n")
        status.unlink()
        status.write_text("-1\n")

        def dead() -> bool:
            reply = heartbeat(client)
            return isinstance(reply, Heartbeat) and not reply.alive

        wait_until(dead)
        wait_until(lambda: not running.children())
        status.unlink()
        os.mkfifo(status)
        client.send(ReadHeartbeat(id=5, address=address(PF)))
        wait_until(running.children)
        assert failure(other.ask(ReadHeartbeat(id=6, address=address(PF))))[1] is ErrorCode.BUSY
        assert running.stop() == 0, "it does not wait for the child, which does not end before it is let go below"
    assert "ReadHeartbeat" in running.audit_lines()[-1]["arguments"]["unfinished"]
    status.open("w").close()  # lets the child end


def test_a_peer_that_goes_away_leaves_an_audited_operation(running: Helper) -> None:
    with running.connect() as client:
        client.send(OpenKubeletSocket(id=1, service=KubeletService.REGISTRATION, wait_ms=200))
        wait_until(lambda: running.audit_lines()[-1]["event"] == "asked")
    wait_until(lambda: running.audit_lines()[-1]["event"] == "done")
    assert running.audit_lines()[-1]["result"]["code"] == "unavailable"


def test_the_kubelets_socket_is_passed_once_it_is_there(running: Helper) -> None:
    with running.connect() as client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as kubelet:
        kubelet.bind(str(running.directory / "kubelet/device-plugins/kubelet.sock"))
        idle = running.open_files()
        client.send(OpenKubeletSocket(id=1, service=KubeletService.REGISTRATION, wait_ms=10_000))
        wait_until(lambda: running.audit_lines()[-1]["event"] == "asked")
        kubelet.listen()
        packet, descriptors, _, _ = socket.recv_fds(client.sock, MAX_MESSAGE, 2)
        assert isinstance(decode_reply(packet), Connected)
        accepted, _ = kubelet.accept()
        with closing(accepted), socket.socket(fileno=descriptors[0]) as ours:
            ours.sendall(b"hello")
            assert accepted.recv(10) == b"hello"
            wait_until(lambda: running.open_files() <= idle)
        with closing(accepted):
            assert accepted.fileno() == -1


def test_the_socket_directory(running: Helper) -> None:
    with running.connect() as client:
        assert isinstance(client.ask(PrepareSocketDirectory(id=1)), Done)
    directory = running.directory / "kubelet/device-plugins/qat.intel.com"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o2770


def test_binding_is_checked_and_audited(running: Helper) -> None:
    running.tree.bind(VF, "vfio-pci")
    with running.connect() as client:

        def bind(where: str) -> AnyReply:
            return client.ask(BindDriver(id=1, address=address(where), driver=DpdkDriver.VFIO_PCI, reason="a 'reason'"))

        reply = bind(VF)
        assert isinstance(reply, Bound)
        assert (reply.driver, reply.changed) == ("vfio-pci", False)
        assert reply.audit.sequence == running.audit_lines()[-1]["sequence"]
        denied = bind(PF)
        assert isinstance(denied, Failure)
        assert (denied.code, denied.rule) == (ErrorCode.DENIED, "virtual-functions-only")
        running.tree.bind(VF2, "somebodys")
        foreign = bind(VF2)
        assert isinstance(foreign, Failure)
        assert (foreign.code, foreign.rule) == (ErrorCode.DENIED, "foreign-driver")
        assert failure(bind("ffff:ff:1f.7"))[1] is ErrorCode.VANISHED
    assert [(line["event"], line.get("verdict", "")) for line in running.audit_lines()[1:]] == [
        ("asked", ""),
        ("done", "ok"),
        ("asked", ""),
        ("refused", "denied"),
        ("asked", ""),
        ("refused", "denied"),
        ("asked", ""),
        ("done", "failed"),
    ]


def test_when_the_log_cannot_be_written_only_heartbeats_go_on(running: Helper) -> None:
    assert running.process is not None
    with running.connect() as client:
        assert isinstance(client.ask(PrepareSocketDirectory(id=1)), Done)
        limits = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (running.audit.stat().st_size + 10, -1))
        shutil.rmtree(running.directory / "kubelet/device-plugins/qat.intel.com")
        number, code, message = failure(client.ask(PrepareSocketDirectory(id=2)))
        assert (number, code) == (2, ErrorCode.AUDIT)
        assert str(running.audit) in message
        assert not (running.directory / "kubelet/device-plugins/qat.intel.com").exists()
        assert isinstance(heartbeat(client), Heartbeat)
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, limits)
        assert isinstance(client.ask(PrepareSocketDirectory(id=3)), Done)
