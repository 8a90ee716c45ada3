"""The helper's child processes under adverse conditions: killed, or impossible to start."""

import os
import resource
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest

from helper_security.figures import tried
from qat_helper.child import Child
from qat_helper.operations.node import Outcome
from qat_shared.messages import AnyRequest, BindDriver, DpdkDriver, ErrorCode, Failure, Heartbeat, ReadHeartbeat
from support.conditions import wait_until
from support.forks import recording_fork
from support.helper_process import PF, VF, failure, heartbeat, helper
from support.sysfs_tree import address


def waits(request: AnyRequest) -> Outcome:
    signal.pause()
    raise AssertionError("nothing but SIGKILL ends it")


@pytest.mark.parametrize("begun", [False, True])
def test_a_child_that_is_killed_has_no_outcome(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    """As the kernel does when memory is short."""
    pids: list[int] = []
    monkeypatch.setattr(os, "fork", recording_fork(os.fork, pids))
    before = os.listdir("/proc/self/fd")
    killed = Child(waits)
    if begun:
        killed.begin(ReadHeartbeat(id=1, address=address(VF)))
        assert select.select([killed.channel], [], [], 0.1)[0] == [], "it is running"
    os.kill(pids[0], signal.SIGKILL)
    os.waitpid(pids[0], 0)
    if not begun:
        killed.begin(ReadHeartbeat(id=1, address=address(VF)))
    assert select.select([killed.channel], [], [], 20)[0]
    assert killed.outcome() is None
    killed.dismiss()
    killed.channel.close()
    assert len(os.listdir("/proc/self/fd")) == len(before), "it leaves nothing"


KILLED = """
import os, signal
from qat_helper.child import Child
fork = os.fork
def killed():
    if fork():
        os.kill(os.getpid(), signal.SIGKILL)
    return 0
os.fork = killed
Child(print)
"""


def test_a_child_whose_helper_was_killed_exits_silently() -> None:
    """It prints no traceback, for which it would need its source, which the sandbox forbids."""
    for _ in range(5):
        ended = subprocess.run([sys.executable, "-c", KILLED], stderr=subprocess.PIPE, timeout=120, check=False)
        assert (ended.returncode, ended.stderr) == (-signal.SIGKILL, b"")


def test_a_child_that_is_killed_is_that_operations_failure() -> None:
    with helper() as running, running.connect() as client:
        running.heartbeat.unlink()
        os.mkfifo(running.heartbeat)
        for number in range(1, 4):
            client.send(ReadHeartbeat(id=number, address=address(PF)))
            wait_until(running.children)
            os.kill(running.children()[0], signal.SIGKILL)
            told = failure(client.receive())
            assert told[:2] == (number, ErrorCode.INTERNAL)
            assert "ended without a result" in told[2]
            wait_until(lambda: not running.children())
        running.heartbeat.unlink()
        running.heartbeat.write_text("0\n")
        assert isinstance(heartbeat(client), Heartbeat)
        assert running.stop() == 0


def test_exited_children_leave_nothing() -> None:
    """Not even a zombie, although nobody waits for them."""
    with helper() as running:
        running.tree.bind(VF, "vfio-pci")
        with running.connect() as client:
            for _ in range(20):
                assert isinstance(heartbeat(client), Heartbeat)
        wait_until(lambda: not running.children())
        assert running.stop() == 0


NO_PROCESSES = """
import errno, os, sys
from qat_helper import main
fork = os.fork
def limited():
    if os.path.exists(sys.argv[1]):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    return fork()
os.fork = limited
sys.exit(main.main(sys.argv[2:]))
"""


def test_without_processes_it_goes_on() -> None:
    """A pod's processes share one limit: a compromised server can use it up."""
    with helper(start=False) as running:
        limit = running.directory / "limit"
        running.command = [sys.executable, "-c", NO_PROCESSES, str(limit)]
        running.start()
        running.tree.bind(VF, "vfio-pci")
        with running.connect() as witness:
            assert isinstance(heartbeat(witness), Heartbeat)
            before = running.open_files_when_idle(witness)
            limit.touch()
            for _ in range(20):
                with running.connect() as client, suppress(BrokenPipeError):
                    for _ in range(50):  # so that much of it is unread when the connection closes
                        client.sock.send(b"nonsense")
                    client.sock.shutdown(socket.SHUT_RD)
            reply = witness.ask(BindDriver(id=1, address=address(VF), driver=DpdkDriver.VFIO_PCI))
            assert isinstance(reply, Failure)
            assert reply.code is ErrorCode.INTERNAL
            assert "cannot start a process" in reply.message
            limit.unlink()
            wait_until(lambda: running.is_idle() and running.open_files() == before)
            assert isinstance(heartbeat(witness), Heartbeat)
        assert running.stop() == 0
        tried("connections that end while no process can be started", 20)


def test_it_hears_again_once_there_are_processes() -> None:
    """Although no peer is left to trigger the next attempt, and descriptors are as scarce as processes."""
    with helper(start=False) as running:
        limit = running.directory / "limit"
        running.command = [sys.executable, "-c", NO_PROCESSES, str(limit)]
        running.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
        before = running.open_files()
        limit.touch()

        def come_and_go() -> bool:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with sock, suppress(BlockingIOError, BrokenPipeError):
                sock.setblocking(False)
                sock.connect(os.fspath(running.socket))
                for _ in range(40):
                    sock.send(b"nonsense")
            return "cannot accept a connection" in running.log_text()

        wait_until(come_and_go)
        limit.unlink()
        wait_until(lambda: running.open_files() == before)
        with running.connect() as client:
            assert isinstance(heartbeat(client), Heartbeat)
        assert running.stop() == 0
