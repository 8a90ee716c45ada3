"""The helper's own processes when the system is against it: killed at once, or not to be had at all."""

import os
import signal
import socket
import sys
from contextlib import suppress

import pytest

from helper_process import VF, heartbeat, helper, wait_until
from helper_security.figures import tried
from qat_helper import child
from qat_helper.child import Child
from qat_helper.errors import OperationError
from qat_helper.node import Outcome
from qat_shared.messages import BindDriver, DpdkDriver, ErrorCode, Failure, Heartbeat
from sysfs_tree import address


def nothing() -> Outcome:
    raise AssertionError("it is never begun")


@pytest.mark.parametrize("when", ["before it is told to begin", "while it begins"])
def test_a_child_that_is_killed_is_that_operations_failure(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """As by the kernel, when memory is short."""
    if when == "while it begins":
        monkeypatch.setattr(child, "_run", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    else:
        monkeypatch.setattr(os, "pidfd_open", killed_first(os.pidfd_open))
    before = os.listdir("/proc/self/fd")
    killed = Child(nothing)
    os.waitid(os.P_PIDFD, killed.pidfd, os.WEXITED | os.WNOWAIT)
    with pytest.raises(OperationError) as caught:
        killed.outcome()
    assert caught.value.code is ErrorCode.INTERNAL
    assert len(os.listdir("/proc/self/fd")) == len(before), "nothing of it is left"
    with pytest.raises(ChildProcessError):
        os.waitpid(killed.pid, os.WNOHANG)


def killed_first(pidfd_open: object) -> object:
    """As pidfd_open, when the process has been killed already."""

    def opened(pid: int) -> int:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert callable(pidfd_open)
        return int(pidfd_open(pid))

    return opened


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
    """A pod's processes share one limit: who has the server can use all of it up."""
    with helper(start=False) as running:
        limit = running.directory / "limit"
        running.command = [sys.executable, "-c", NO_PROCESSES, str(limit)]
        running.start()
        running.tree.bind(VF, "vfio-pci")
        with running.connect() as witness:
            assert isinstance(heartbeat(witness), Heartbeat)
            before = running.open_files()
            limit.touch()
            for _ in range(20):
                with running.connect() as client, suppress(BrokenPipeError):
                    for _ in range(50):  # so that much of it is not read when it is closed
                        client.sock.send(b"nonsense")
                    client.sock.shutdown(socket.SHUT_RD)
            for request in (BindDriver(id=1, address=address(VF), driver=DpdkDriver.VFIO_PCI),):
                reply = witness.ask(request)
                assert isinstance(reply, Failure)
                assert reply.code is ErrorCode.INTERNAL
                assert "no process" in reply.message
            limit.unlink()
            wait_until(lambda: running.settled() and running.open_files() == before)
            assert isinstance(heartbeat(witness), Heartbeat)
        assert running.stop() == 0
        tried("connections that end while no process can be started", 20)
