"""The helper started by systemd's socket activation (sd_listen_fds(3)): what it takes, refuses and leaves."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qat_shared.messages import PROTOCOL, Hello, Welcome
from support.conditions import wait_until
from support.helper_process import Client, Helper, helper

ACTIVATE = shutil.which("systemd-socket-activate")


@contextmanager
def _in_descriptor_3(sock: socket.socket | None) -> Iterator[None]:
    """Descriptor 3 of this process is the socket while the block runs (None: /dev/null); children inherit it."""
    saved = os.dup(3) if _is_open(3) else None
    source = os.open(os.devnull, os.O_RDONLY) if sock is None else os.dup(sock.fileno())
    try:
        os.dup2(source, 3)
        yield
    finally:
        os.close(source)
        if saved is None:
            os.close(3)
        else:
            os.dup2(saved, 3, inheritable=False)
            os.close(saved)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _as_systemd(fds: str = "1") -> dict[str, object]:
    """Popen's arguments: the shell sets LISTEN_PID to its own pid, which is the helper's after exec."""
    return {"env": {**os.environ, "LISTEN_FDS": fds}, "pass_fds": (3,)}


@contextmanager
def _activated(sock: socket.socket | None, fds: str = "1") -> Iterator[Helper]:
    with helper(start=False) as node, _in_descriptor_3(sock):
        node.command = ["/bin/sh", "-c", 'LISTEN_PID=$$ exec "$0" "$@"', *node.command]
        yield node


def _listener(directory: str, kind: int = socket.SOCK_SEQPACKET, *, listen: bool = True) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(f"{directory}/unit.sock")
    if listen:
        sock.listen()
    return sock


def test_it_serves_on_the_socket_that_was_passed_and_leaves_it_there() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        path = Path(directory, "unit.sock")
        with _listener(directory) as sock, _activated(sock) as node:
            with Client(path, greet=False) as early:  # the kernel keeps who comes before the helper is up
                node.start(**_as_systemd())
                assert path.as_posix() in node.log_text()
                assert isinstance(early.ask(Hello(id=0, protocol=PROTOCOL, version="early")), Welcome)
            Client(path).close()
            assert not node.socket.exists()
            assert node.stop() == 0
            assert path.is_socket()
            node.start(**_as_systemd())  # again, on the same socket
            Client(path).close()
            assert node.stop(signal.SIGKILL) == -signal.SIGKILL
            assert path.is_socket()


def test_a_passed_socket_is_not_inherited_by_what_the_helper_starts() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, _listener(directory) as sock, _activated(sock) as node:
        process = node.start(**_as_systemd())
        assert not os.get_inheritable(sock.fileno())
        flags = Path(f"/proc/{process.pid}/fdinfo/3").read_text()
        assert int(next(line for line in flags.splitlines() if line.startswith("flags")).split()[1], 8) & os.O_CLOEXEC


@pytest.mark.parametrize(
    ("kind", "listens", "fds"),
    [
        (socket.SOCK_STREAM, True, "1"),
        (socket.SOCK_DGRAM, False, "1"),
        (socket.SOCK_SEQPACKET, False, "1"),
        (socket.SOCK_SEQPACKET, True, "2"),
        (socket.SOCK_SEQPACKET, True, ""),
    ],
)
def test_another_socket_is_refused(kind: int, listens: bool, fds: str) -> None:
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        _listener(directory, kind, listen=listens) as sock,
        _activated(sock) as node,
    ):
        assert "ListenSequentialPacket=" in node.start_failure(**_as_systemd(fds))


def test_what_is_no_socket_is_refused() -> None:
    with _activated(None) as node:
        assert "ListenSequentialPacket=" in node.start_failure(**_as_systemd())


def test_variables_meant_for_another_process_are_ignored() -> None:
    with helper(start=False) as node:
        node.start(env={**os.environ, "LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())})
        node.connect().close()


@pytest.mark.skipif(ACTIVATE is None, reason="needs systemd-socket-activate")
def test_with_systemd_socket_activate() -> None:
    assert ACTIVATE is not None
    with helper(start=False) as node:
        unit = node.directory / "unit.sock"
        command = [ACTIVATE, "--seqpacket", f"--listen={unit}", *node.command, *node.options()]
        with node.log.open("ab") as log:
            node.process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
        wait_until(unit.exists)
        assert "serving on" not in node.log_text()  # it starts with the first connection only
        wait_until(lambda: "Listening on" in node.log_text())
        with Client(unit):  # greets: the helper that this starts has answered
            assert "serving on" in node.log_text()
        assert node.stop() == 0
