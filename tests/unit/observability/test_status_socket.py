"""The local status socket: its permissions, and that it replaces a stale socket but not a live one."""

import os
import socket
import stat
from pathlib import Path

from qat_server.observability import status_socket
from qat_server.observability.status import STATUS_SOCKET


def test_it_is_there_for_its_user_and_group_only_while_it_is_served(tmp_path: Path) -> None:
    with status_socket.listening(tmp_path) as listener:
        assert stat.S_IMODE((tmp_path / STATUS_SOCKET).lstat().st_mode) == 0o660
        assert os.listdir(tmp_path) == [STATUS_SOCKET]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / STATUS_SOCKET))
            listener.accept()[0].close()
    assert os.listdir(tmp_path) == []


def test_a_dead_one_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / STATUS_SOCKET))
    with status_socket.listening(tmp_path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / STATUS_SOCKET))


def test_that_of_the_next_server_stays(tmp_path: Path) -> None:
    old, new = status_socket.listening(tmp_path), status_socket.listening(tmp_path)
    old.__enter__()
    with new:
        old.__exit__(None, None, None)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / STATUS_SOCKET))
