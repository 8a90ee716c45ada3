"""The client of the local status socket."""

import socket
from pathlib import Path

import pytest

from qat_server.command_line.status import client
from qat_server.command_line.status.client import StatusError, fetch_local
from qat_server.observability import status_socket
from qat_server.observability.status_format import STATUS_SOCKET


def test_a_long_directory_is_no_hindrance_and_a_silent_server_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.05)
    deep = tmp_path / ("d" * 90) / ("e" * 90)
    deep.mkdir(parents=True)
    with status_socket.listening(deep), pytest.raises(StatusError, match="timed out"):
        fetch_local([deep / STATUS_SOCKET])


def test_without_a_server_it_is_said_where_it_was_looked_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / STATUS_SOCKET))
    with pytest.raises(StatusError) as error:
        fetch_local([tmp_path / STATUS_SOCKET, tmp_path / "nowhere" / STATUS_SOCKET])
    assert "Connection refused" in str(error.value)
    assert "No such file or directory" in str(error.value)
    assert "--kubelet-dir" in str(error.value)
