"""Notifications to a service manager at a path or an abstract name; a manager that is absent or busy."""

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat_server.host import service_manager
from qat_server.host.service_manager import VARIABLE, ServiceManager


def listening(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(address.replace("@", "\0", 1))
    sock.settimeout(60)
    return sock


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "abstract":
        yield f"@qat-{os.getpid()}-{secrets.token_hex(8)}"
        return
    before = Path.cwd()
    os.chdir(tmp_path)  # a socket's path has 107 bytes at most
    try:
        path = f"/proc/self/cwd/{secrets.token_hex(4)}"
        yield path
    finally:
        os.chdir(before)


async def test_start_and_end_are_notified(address: str) -> None:
    with listening(address) as manager_socket:
        environment = {VARIABLE: address, "PATH": "/bin"}
        manager = ServiceManager.from_environment(environment)
        assert manager is not None
        assert environment == {"PATH": "/bin"}, "nothing that this process starts may speak for it"
        await manager.ready("started\nwith 2 qat.intel.com/cy")
        assert manager_socket.recv(4096) == b"READY=1\nSTATUS=started with 2 qat.intel.com/cy\n", (
            "a line is one variable"
        )
        manager.stopping()
        assert manager_socket.recv(4096) == b"STOPPING=1\nSTATUS=stopping\n"
        manager.close()


async def test_the_socket_is_kept_when_its_name_has_gone(tmp_path: Path) -> None:
    """As in the sandbox, where no socket outside can be connected to any more."""
    path = tmp_path / "notify"
    with listening(str(path)) as manager_socket:
        manager = ServiceManager.from_environment({VARIABLE: str(path)})
        assert manager is not None
        path.unlink()
        await manager.ready("started")
        assert manager_socket.recv(4096).startswith(b"READY=1\n")
        manager.close()


async def test_a_long_status_fits_into_a_datagram(tmp_path: Path) -> None:
    with listening(str(tmp_path / "notify")) as manager_socket:
        manager = ServiceManager.from_environment({VARIABLE: str(tmp_path / "notify")})
        assert manager is not None
        await manager.ready("ü" * 10_000)
        packet = manager_socket.recv(65536)
        assert len(packet) < 4096
        assert packet.endswith(b"...\n")
        manager.close()


async def test_the_start_waits_for_a_busy_manager_but_the_end_does_not(tmp_path: Path) -> None:
    with listening(str(tmp_path / "notify")) as manager_socket:
        manager = ServiceManager.from_environment({VARIABLE: str(tmp_path / "notify")})
        assert manager is not None
        others, before = 0, -1
        with contextlib.ExitStack() as stack:
            while others != before:  # a sender's own buffer may be full before the queue is: then there is another one
                before = others
                other = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
                other.connect(str(tmp_path / "notify"))
                with contextlib.suppress(BlockingIOError):
                    while True:
                        other.send(b"STATUS=another service\n")
                        others += 1
        notifying = asyncio.ensure_future(manager.ready("started"))
        manager.stopping()  # returns, though there is no room
        await asyncio.sleep(0)
        assert not notifying.done()
        for _ in range(others):
            manager_socket.recv(4096)
        await notifying
        assert manager_socket.recv(4096) == b"READY=1\nSTATUS=started\n"
        manager.close()


@pytest.mark.parametrize("address", ["/no/such/socket", "notify", "vsock:2:1234", f"@qat-{secrets.token_hex(8)}"])
def test_an_unreachable_manager_is_logged(address: str, caplog: pytest.LogCaptureFixture) -> None:
    environment = {VARIABLE: address}
    assert ServiceManager.from_environment(environment) is None
    assert not environment
    assert "service manager cannot be reached" in caplog.text


def test_without_a_manager_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert ServiceManager.from_environment({}) is None
    assert not caplog.text


async def test_a_manager_that_has_gone_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager_socket = listening(str(tmp_path / "notify"))
    manager = ServiceManager.from_environment({VARIABLE: str(tmp_path / "notify")})
    assert manager is not None
    manager_socket.close()
    await manager.ready("started")
    manager.stopping()
    assert "service manager cannot be notified" in caplog.text
    manager.close()


def test_the_variable_is_that_of_systemd() -> None:
    assert service_manager.VARIABLE == "NOTIFY_SOCKET"
