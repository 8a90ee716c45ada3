"""The real qat-helper process on a small sysfs tree, and a plain client of its socket."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qat_shared.codec import decode_reply, encode
from qat_shared.messages import (
    MAX_MESSAGE,
    PROTOCOL,
    AnyReply,
    AnyRequest,
    ErrorCode,
    Failure,
    Heartbeat,
    Hello,
    ReadHeartbeat,
    Welcome,
)
from support.conditions import wait_until
from support.sysfs_tree import SysfsTree, address

PF, VF, VF2 = "6b:00.0", "6b:00.1", "6b:00.2"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
COMMAND = str(Path(sys.executable).with_name("qat-helper"))


def helper_options(sysfs_root: Path, kubelet_directory: Path, socket_path: Path, audit_log: Path) -> list[str]:
    """The options of a helper whose server is the user that runs the test."""
    return [
        f"--sysfs-root={sysfs_root}",
        f"--kubelet-dir={kubelet_directory}",
        f"--socket={socket_path}",
        f"--server-uid={os.geteuid()}",
        f"--server-gid={os.getegid()}",
        f"--audit-log={audit_log}",
    ]


class Client:
    """One connection. `ask` sends a request and waits for one reply.

    `uid`: connect as this user and group, which needs root; the kernel keeps them for SO_PEERCRED.
    """

    def __init__(self, path: Path, *, greet: bool = True, uid: int | None = None) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Before the time-out is set: with one, a full backlog is an error.
        if uid is None:
            self.sock.connect(str(path))
        else:
            assert run_as_user(uid, uid, [partial(self.sock.connect, str(path))]) == 0
        self.sock.settimeout(120)
        if greet:
            reply = self.ask(Hello(id=0, protocol=PROTOCOL, version="test"))
            if not isinstance(reply, Welcome):
                self.close()
                raise AssertionError(reply)

    def send(self, request: AnyRequest | bytes) -> None:
        self.sock.send(request if isinstance(request, bytes) else encode(request))

    def receive(self) -> AnyReply:
        return decode_reply(self.sock.recv(MAX_MESSAGE + 1))

    def ask(self, request: AnyRequest | bytes) -> AnyReply:
        self.send(request)
        return self.receive()

    def at_end(self) -> bool:
        """Wait for the next packet; whether the connection has ended instead."""
        try:
            return self.sock.recv(MAX_MESSAGE) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Helper:
    """A helper and its node in `directory`; made by `helper`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tree = SysfsTree(directory / "sys")
        self.tree.pf(PF)
        self.tree.vf(VF, PF)
        self.tree.vf(VF2, PF)
        self.debugfs = directory / "sys/kernel/debug/qat_4xxx_0000:6b:00.0"
        (self.debugfs / "heartbeat").mkdir(parents=True)
        self.heartbeat = self.debugfs / "heartbeat/status"
        self.heartbeat.write_text("0\n")
        for folder in ("device-plugins", "pod-resources"):
            (directory / "kubelet" / folder).mkdir(parents=True)
        self.socket = directory / "helper.sock"
        self.audit = directory / "audit.jsonl"
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.command = [COMMAND]
        self.traceable = os.geteuid() != 0  # so that tests can read its descriptors; root always can

    def spawn(self, *options: str, **popen: Any) -> "subprocess.Popen[bytes]":
        """Start the command, without waiting for it to serve. Later options override earlier ones."""
        with self.log.open("ab") as log:
            command = [*self.command, *self.options(), *options]
            self.process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, **popen)
        return self.process

    def options(self) -> list[str]:
        """The helper's options on this node."""
        plain = helper_options(self.directory / "sys", self.directory / "kubelet", self.socket, self.audit)
        return [*plain, *(["--traceable"] if self.traceable else [])]

    def start(self, *options: str, **popen: Any) -> "subprocess.Popen[bytes]":
        """Start the helper and wait until it serves."""
        before = self.log_text()
        process = self.spawn(*options, **popen)
        wait_until(lambda: "serving on" in self.log_text()[len(before) :] or process.poll() is not None)
        assert process.poll() is None, self.log_text()
        return process

    def start_failure(self, *options: str, **popen: Any) -> str:
        """Start it where it must fail with status 2. Returns its one-line message."""
        before = self.log_text()
        assert self.spawn(*options, **popen).wait(120) == 2, self.log_text()
        text = self.log_text()[len(before) :]
        assert text.startswith("qat-helper: ")
        assert text.count("\n") == 1
        return text

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Stop it. Returns the exit status."""
        process, self.process = self.process, None
        assert process is not None
        process.send_signal(how)
        return process.wait(120)

    def log_text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def audit_lines(self) -> list[dict[str, Any]]:
        """The audit log so far, without a line that is still being written."""
        whole, _, _ = self.audit.read_bytes().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()]

    def open_files(self) -> int:
        """The number of its open descriptors."""
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def open_files_when_idle(self, client: Client) -> int:
        """The number of open descriptors once no operation is running.

        A client's reply arrives before the helper handles the child's exit; the Hello makes sure that it has.
        """
        wait_until(lambda: not self.children())
        assert isinstance(client.ask(Hello(id=0, protocol=PROTOCOL, version="test")), Welcome)
        return self.open_files()

    def children(self) -> list[int]:
        """The pids of its child processes."""
        assert self.process is not None
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def is_idle(self) -> bool:
        """Whether it has no child process, including one that closes a dropped peer's socket."""
        self.connect(greet=False).close()
        return not self.children()

    def peak_memory(self) -> int:
        """Its peak memory in KiB (VmHWM)."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

    def connect(self, *, greet: bool = True) -> Client:
        return Client(self.socket, greet=greet)


def failure(reply: AnyReply) -> tuple[int, ErrorCode, str]:
    """A Failure's id, code and message."""
    assert isinstance(reply, Failure), reply
    return reply.id, reply.code, reply.message


def heartbeat(client: Client, number: int = 1) -> AnyReply:
    """The reply to a read, which policy allows."""
    return client.ask(ReadHeartbeat(id=number, address=address(PF)))


def wait_until_served(client: Client) -> None:
    """Wait until a read succeeds, and is not refused because an earlier client's read is still running."""
    wait_until(lambda: isinstance(heartbeat(client), Heartbeat))


@contextmanager
def helper(*options: str, start: bool = True) -> Iterator[Helper]:
    """A running helper on a node with one PF and two VFs."""
    directory = Path(tempfile.mkdtemp(prefix="qat-", dir="/tmp"))  # a socket path is limited to 107 bytes
    running = Helper(directory)
    try:
        if start:
            running.start(*options)
        yield running
    finally:
        if running.process is not None and running.process.poll() is None:
            running.process.kill()
            running.process.wait()
        shutil.rmtree(directory)


def run_as_user(uid: int, gid: int, run: Sequence[Callable[[], object]]) -> int:
    """Run the steps in a child process with this uid and gid. Returns 0 if nothing was raised. Needs root."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            for step in run:
                step()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            raise
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
