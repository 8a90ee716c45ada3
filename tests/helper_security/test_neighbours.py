"""Attacks by a process with the server's uid and group other than requests: on the helper's process and its files.

The helper runs as in production: uid 0, the server's group, no capabilities, no way to gain any.
"""

import ctypes
import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from helper_security.chain import verified
from helper_security.figures import tried
from qat_shared.messages import Done, ErrorCode, Heartbeat, PrepareSocketDirectory, SocketDirectory
from support.helper_process import COMMAND, Helper, failure, heartbeat, helper, needs_root, run_as_user

pytestmark = [
    needs_root,
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) drops the helper's capabilities"),
]
UID = GID = 65532
NO_CAPABILITIES = ["--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
REFUSALS = (errno.EPERM, errno.EACCES)
_LIBC = ctypes.CDLL(None, use_errno=True)
_PTRACE_ATTACH, _PTRACE_SEIZE = 16, 0x4206
_PIDFD_GETFD = 438


@pytest.fixture
def running() -> Iterator[Helper]:
    with helper(start=False) as running:
        running.directory.chmod(0o755)
        kubelet = running.directory / "kubelet/device-plugins"
        kubelet.chmod(0o750)  # as the kubelet makes it
        (running.directory / "kubelet/plugins_registry").mkdir(mode=0o750)
        socket_directory = running.directory / "run"
        socket_directory.mkdir(mode=0o750)
        os.chown(socket_directory, 0, GID)
        running.socket = socket_directory / "helper.sock"
        running.command = ["setpriv", f"--regid={GID}", *NO_CAPABILITIES, COMMAND]
        running.start(f"--server-uid={UID}", f"--server-gid={GID}")
        yield running


def checked(result: int) -> int:
    """A system call's result. Raises OSError."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def refused(attempts: dict[str, Callable[[], object]]) -> None:
    """The kernel refuses each attempt."""
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            assert error.errno in REFUSALS, f"{name}: {error}"
        else:
            raise AssertionError(f"{name} was not refused")


def test_its_process(running: Helper) -> None:
    assert running.process is not None
    pid = running.process.pid
    status = Path(f"/proc/{pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    attempts: dict[str, Callable[[], object]] = {
        "ending it": partial(os.kill, pid, signal.SIGTERM),
        "killing it": partial(os.kill, pid, signal.SIGKILL),
        "stopping it": partial(os.kill, pid, signal.SIGSTOP),
        "ptrace attach": lambda: checked(_LIBC.ptrace(_PTRACE_ATTACH, pid, None, None)),
        "ptrace seize": lambda: checked(_LIBC.ptrace(_PTRACE_SEIZE, pid, None, None)),
        "reading its memory": lambda: os.open(f"/proc/{pid}/mem", os.O_RDONLY),
        "writing its memory": lambda: os.open(f"/proc/{pid}/mem", os.O_RDWR),
        "its environment": lambda: os.open(f"/proc/{pid}/environ", os.O_RDONLY),
        "the list of its descriptors": lambda: os.listdir(f"/proc/{pid}/fd"),
        "its root": lambda: os.listdir(f"/proc/{pid}/root/"),
        "its OOM score": lambda: Path(f"/proc/{pid}/oom_score_adj").write_text("1000"),
        "its limits": lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0)),
        "its processors": lambda: os.sched_setaffinity(pid, {0}),
        "its priority": lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
        "its scheduler": lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)),
        "a descriptor of it": lambda: checked(_LIBC.syscall(_PIDFD_GETFD, os.pidfd_open(pid), 3, 0)),
        "its socket's mode": lambda: os.chmod(running.socket, 0o600),
        "its socket's name": lambda: os.unlink(running.socket),
        "another in its place": lambda: os.rename(running.socket, running.socket.with_name("other")),
        "its audit log": lambda: os.open(running.audit, os.O_RDONLY),
        "more in its audit log": lambda: os.open(running.audit, os.O_WRONLY | os.O_APPEND),
    }
    assert run_as_user(UID, GID, [lambda: refused(attempts)]) == 0
    tried("attempts on the helper's process and files that the kernel refused", len(attempts))


def test_no_signal_by_way_of_its_own_socket(running: Helper) -> None:
    """The kernel can signal a socket's owner. Anyone who has the socket can set the owner, and is checked."""
    assert running.process is not None
    pid = running.process.pid

    def aim() -> None:
        with running.connect() as client:
            fcntl.fcntl(client.sock, fcntl.F_SETOWN, pid)
            fcntl.fcntl(client.sock, fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(client.sock, fcntl.F_SETFL, fcntl.fcntl(client.sock, fcntl.F_GETFL) | os.O_ASYNC)
            for _ in range(20):
                assert isinstance(heartbeat(client), Heartbeat)

    assert run_as_user(UID, GID, [aim]) == 0
    assert running.process.poll() is None


PLANTS: dict[str, Callable[[int, Path], object]] = {
    "link": lambda at, secret: os.symlink(secret, "link", dir_fd=at),
    "link to itself": lambda at, secret: os.symlink("..", "qat.intel.com", dir_fd=at),
    "link upwards": lambda at, secret: os.symlink("../../..", "kubelet.sock", dir_fd=at),
    "pipe": lambda at, secret: os.mkfifo("pipe", dir_fd=at),
    "folder": lambda at, secret: os.mkdir("folder", 0o777, dir_fd=at),
}


@pytest.mark.parametrize("word", SocketDirectory)
def test_what_it_plants_in_the_directory_that_it_was_given(running: Helper, word: SocketDirectory) -> None:
    secret = running.directory / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    path = running.directory / "kubelet" / word.value.replace("plugins-r", "plugins_r") / "qat.intel.com"

    def prepare() -> None:
        with running.connect() as client:
            assert isinstance(client.ask(PrepareSocketDirectory(id=1, directory=word)), Done)

    assert run_as_user(UID, GID, [prepare]) == 0
    at = os.open(
        path, os.O_RDONLY | os.O_DIRECTORY
    )  # the server sees this directory through a mount, and has no other path to it

    def plant() -> None:
        for attempt in PLANTS.values():
            attempt(at, secret)
        refused(
            {
                "a hard link": lambda: os.link(secret, "hard", dst_dir_fd=at),
                "its mode": lambda: os.fchmod(at, 0o777),
                "its name": lambda: os.rename(path, path.with_name("other")),
                "its removal": lambda: os.rmdir(path),
                "its name from within": lambda: os.rename(".", "../other", src_dir_fd=at, dst_dir_fd=at),
                "a link beside it": lambda: os.symlink(secret, "../more", dir_fd=at),
                "the kubelet's socket": lambda: os.unlink("../kubelet.sock", dir_fd=at),
            }
        )

    assert run_as_user(UID, GID, [plant, prepare]) == 0
    status = os.fstat(at)
    os.close(at)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, GID, 0o770)
    assert (secret.read_text(), secret.stat().st_gid, stat.S_IMODE(secret.stat().st_mode)) == ("root's", 0, 0o600)
    assert [line["verdict"] for line in verified(running.audit) if line["event"] == "done"] == ["ok"] * 2
    tried("things planted in the directory that the server was given", len(PLANTS))


IN_ITS_PLACE: dict[str, Callable[[Path, Path], object]] = {
    "a link to a folder": lambda path, folder: path.symlink_to(folder),
    "a link to nowhere": lambda path, folder: path.symlink_to(folder / "nowhere"),
    "a file": lambda path, folder: path.write_text(""),
    "a pipe": lambda path, folder: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", IN_ITS_PLACE)
def test_what_is_not_a_directory_is_neither_followed_nor_changed(running: Helper, kind: str) -> None:
    """Only a process that can write the kubelet's directory can put it there; then the helper does nothing."""
    folder = running.directory / "folder"
    folder.mkdir(mode=0o700)
    path = running.directory / "kubelet/device-plugins/qat.intel.com"
    IN_ITS_PLACE[kind](path, folder)
    before = path.lstat()

    def prepare() -> None:
        with running.connect() as client:
            assert failure(client.ask(PrepareSocketDirectory(id=1)))[1] is ErrorCode.KERNEL

    assert run_as_user(UID, GID, [prepare]) == 0
    assert path.lstat() == before
    assert (folder.stat().st_gid, stat.S_IMODE(folder.stat().st_mode)) == (0, 0o700)


def test_the_helper_takes_no_other_things_place_for_its_socket(running: Helper) -> None:
    """After a kill, whatever is at the socket's path is removed only if it is a socket on which nobody listens."""
    running.stop(signal.SIGKILL)
    running.socket.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        elsewhere = running.directory / "other.sock"
        other.bind(str(elsewhere))
        for target in (elsewhere, running.audit, running.directory / "nowhere"):
            running.socket.symlink_to(target)
            assert "is not a socket" in running.start_failure(f"--server-uid={UID}", f"--server-gid={GID}")
            assert running.socket.is_symlink()
            running.socket.unlink()
        assert elsewhere.exists()
