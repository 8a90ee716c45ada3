"""Floods of requests, connections, refusals and unread replies: their cost is bounded."""

import os
import select
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from helper_security.chain import interrupted, verified
from helper_security.figures import most, tried
from qat_helper.serve import MAX_PEERS
from qat_shared.codec import encode
from qat_shared.messages import (
    PROTOCOL,
    AnyRequest,
    BindDriver,
    Bound,
    DpdkDriver,
    ErrorCode,
    Failure,
    Heartbeat,
    Hello,
    PrepareSocketDirectory,
    ReadDeviceConfig,
    ReadHeartbeat,
)
from support.conditions import wait_until
from support.helper_process import PF, VF, Client, Helper, heartbeat, helper, needs_root, run_as_user, wait_until_served
from support.sysfs_tree import address

MEMORY = 24 * 1024
"""KiB by which the helper may grow: more than all queues of all peers filled with the longest replies."""
AT_ONCE, A_SECOND = 2400, 0.5
"""Audited requests of one uid."""
PATIENCE = 60
"""Seconds within which another peer is served; generous, since machines are shared."""


@contextmanager
def bounded(running: Helper, what: str) -> Iterator[Client]:
    """Another peer is served before, during and after; then descriptors and memory are as before."""
    with running.connect() as witness:
        assert isinstance(heartbeat(witness), Heartbeat)
        descriptors, before = running.open_files_when_idle(witness), running.peak_memory()
        yield witness
        most(f"KiB that the helper grew under {what}", running.peak_memory() - before)
        assert running.peak_memory() - before < MEMORY
        wait_until(lambda: running.is_idle() and running.open_files() == descriptors)
        wait_until_served(witness)


def served_meanwhile(witness: Client) -> None:
    """The witness gets a reply in time."""
    began = time.monotonic()
    assert isinstance(heartbeat(witness), Heartbeat | Failure)
    waited = time.monotonic() - began
    most("ms that another peer waited for its answer", round(waited * 1000))
    assert waited < PATIENCE


class Flood(threading.Thread):
    """A connection that sends as fast as it can and reads the replies."""

    def __init__(self, running: Helper, request: AnyRequest, number: int) -> None:
        super().__init__()
        self.client = running.connect()
        self.packet = encode(request)
        self.number = number
        self.answers: Counter[str] = Counter()

    def run(self) -> None:
        sock = self.client.sock
        sock.setblocking(False)
        sent = 0
        while sum(self.answers.values()) < self.number:
            readable, writable, _ = select.select([sock], [sock] if sent < self.number else [], [], 20)
            if readable:
                reply = self.client.receive()
                self.answers[reply.code if isinstance(reply, Failure) else type(reply).__name__] += 1
            elif writable:
                with suppress(BlockingIOError):
                    sent += sock.send(self.packet) > 0
        self.client.close()


REQUESTS: dict[str, AnyRequest] = {
    "binds": BindDriver(id=1, address=address(VF), driver=DpdkDriver.VFIO_PCI),
    "directories": PrepareSocketDirectory(id=1),
    "heartbeats": ReadHeartbeat(id=1, address=address(PF)),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_ten_thousand_requests(kind: str) -> None:
    with helper() as running:
        running.tree.bind(VF, "vfio-pci")
        with bounded(running, f"10,000 {kind}") as witness:
            floods = [Flood(running, REQUESTS[kind], 1000) for _ in range(10)]
            began = time.monotonic()
            for flood in floods:
                flood.start()
            while any(flood.is_alive() for flood in floods):
                served_meanwhile(witness)
            seconds = time.monotonic() - began
            answers = sum((flood.answers for flood in floods), Counter[str]())
            assert sum(answers.values()) == 10_000
            assert set(answers) <= {"Bound", "Done", "Heartbeat", ErrorCode.BUSY}
            if kind != "heartbeats":
                allowed = AT_ONCE + A_SECOND * (seconds + 1)
                assert answers[ErrorCode.BUSY] >= 10_000 - allowed, "the rest is refused as busy"
                assert sum(line["event"] != "start" for line in verified(running.audit)) <= 2 * allowed
            assert not interrupted(verified(running.audit))
        tried("requests of the floods", 10_000)


def test_two_hundred_connections(running: Helper) -> None:
    with bounded(running, "200 connections") as witness, ExitStack() as stack:
        hello = Hello(id=1, protocol=PROTOCOL, version="x")
        clients = [stack.enter_context(running.connect(greet=False)) for _ in range(MAX_PEERS - 1)]
        more = [stack.enter_context(running.connect(greet=False)) for _ in range(200 - len(clients))]
        served_meanwhile(witness)
        assert all(not isinstance(client.ask(hello), Failure) for client in clients)
        told = 0
        for client in more:
            with suppress(BrokenPipeError, ConnectionResetError):
                client.send(hello)
            told += client.at_end() is False
        assert 0 < told <= MAX_PEERS, "the last ones receive the reason, the others lose their connection"
        assert running.open_files() < 2 * MAX_PEERS + 20
        tried("connections at once", 200)


def test_connections_that_come_and_go(running: Helper) -> None:
    with bounded(running, "2,000 connections that come and go") as witness:
        for number in range(2000):
            with running.connect(greet=False) as client, suppress(BrokenPipeError):
                if number % 3:
                    client.send(b"x" * (number % 5))
        served_meanwhile(witness)
        tried("connections that come and go", 2000)


def test_peers_that_do_not_read_the_longest_answers() -> None:
    with helper(start=False) as running:
        pfs = [f"7{number}:00.0" for number in range(8)]
        for pf in pfs:
            running.tree.pf(pf)
            debugfs = running.debugfs.parent / f"qat_4xxx_0000:{pf}"
            debugfs.mkdir()
            (debugfs / "dev_cfg").write_text("x" * 32 * 1024)
        running.start()
        with bounded(running, "the longest answers, unread by 15 peers") as witness, ExitStack() as stack:
            clients = [stack.enter_context(running.connect()) for _ in range(MAX_PEERS - 1)]
            left = list(clients)
            deadline = time.monotonic() + 4 * PATIENCE
            while left and time.monotonic() < deadline:
                for client in list(left):
                    try:
                        for pf in pfs:
                            client.send(ReadDeviceConfig(id=1, address=address(pf)))
                    except (BrokenPipeError, ConnectionResetError):
                        left.remove(client)
                    wait_until(lambda: not running.children())
                served_meanwhile(witness)
            assert not left, "peers are dropped when their queues are full"
            tried("peers that do not read", len(clients))


# Refusals are audited too: they must not fill the disk


def test_reads_that_policy_denies_do_not_fill_the_log() -> None:
    with helper(start=False) as running:
        policy = running.directory / "policy.toml"
        policy.write_text('addresses = ["0000:01:00.0"]\n')
        policy.chmod(0o600)
        running.start(f"--policy={policy}")
        began = time.monotonic()
        floods = [Flood(running, REQUESTS["heartbeats"], 1000) for _ in range(10)]
        for flood in floods:
            flood.start()
        for flood in floods:
            flood.join()
        allowed = AT_ONCE + A_SECOND * (time.monotonic() - began + 1)
        assert sum((flood.answers for flood in floods), Counter[str]()) == {ErrorCode.DENIED: 10_000}
        assert AT_ONCE <= len(running.audit_lines()) <= allowed + 1
        running.stop()
        counted = verified(running.audit)[-1]["arguments"].values()
        assert any(isinstance(number, int) and number >= 10_000 - allowed for number in counted), "the rest is counted"
        tried("requests of the floods", 10_000)


@needs_root
def test_strangers_do_not_fill_the_log(running: Helper) -> None:
    """Not even with changing uids; and the server's own rate limit is unaffected."""
    running.directory.chmod(0o755)
    running.tree.bind(VF, "vfio-pci")
    os.chown(running.socket, -1, 4321)
    began = time.monotonic()

    def knock() -> None:
        for _ in range(1500):
            running.connect(greet=False).close()

    for uid in (1234, 1235):
        assert run_as_user(uid, 4321, [knock]) == 0
    with running.connect() as client:
        assert isinstance(client.ask(REQUESTS["binds"]), Bound)
    allowed = AT_ONCE + A_SECOND * (time.monotonic() - began + 1)
    refused = [line for line in verified(running.audit) if line["event"] == "refused"]
    assert AT_ONCE <= len(refused) <= allowed
    tried("connections of strangers", 3000)
