"""Asks a running server for its status: HTTP, over TCP or over the socket beside its endpoints (status_socket.py)."""

import http.client
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qat_server.parsing.values import HostPort

TIMEOUT: Final = 5.0  # seconds
_LIMIT: Final = 16 * 2**20  # bytes; 1024 VFs are some 300 KB


class StatusError(Exception):
    """There is no status to be had: one sentence."""


class _LocalConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        # By a descriptor of the directory: a socket's path has 107 bytes at most.
        directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(TIMEOUT)
            self.sock.connect(f"/proc/self/fd/{directory}/{self._path.name}")
        finally:
            os.close(directory)


def fetch(address: HostPort) -> bytes:
    """The JSON text of http://<address>/status. Raises StatusError."""
    # An address to listen on everywhere is no address to connect to.
    host = {"": "localhost", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104
    where = f"http://{HostPort(host, address.port)}/status"
    try:
        return _ask(http.client.HTTPConnection(host, address.port, timeout=TIMEOUT), where)
    except OSError as error:
        why = error.strerror or str(error)
        raise StatusError(
            f"no status at {where} ({why}): is the server running with --metrics-address {address}?"
        ) from error


def fetch_local(sockets: Sequence[Path]) -> bytes:
    """The JSON text of the status of the server at the first of these sockets that is there. Raises StatusError."""
    refusals = []
    for path in sockets:
        try:
            return _ask(_LocalConnection(path), str(path))
        except OSError as error:
            refusals.append(f"{path}: {error.strerror or error}")
    raise StatusError(
        f"no server to ask ({'; '.join(refusals)}): is it running, is --kubelet-dir as the server has it, "
        "and is this its user, or root?"
    )


def _ask(connection: http.client.HTTPConnection, where: str) -> bytes:
    """Raises OSError when nobody is there, StatusError when it is somebody else."""
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        body = response.read(_LIMIT + 1)
    except http.client.HTTPException as error:
        raise StatusError(f"{where} is not a qat-plugin's ({str(error) or type(error).__name__})") from error
    finally:
        connection.close()
    if response.status != http.client.OK or len(body) > _LIMIT:
        raise StatusError(f"{where} is not a qat-plugin's (it answered {response.status})")
    return body
