"""The client of a running server's /status: HTTP over TCP, or over the local socket (status_socket.py)."""

import http.client
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from qat_server.observability.status_format import Status, decode
from qat_server.parsing.values import HostPort
from qat_shared import VERSION

TIMEOUT: Final = 5.0  # seconds
_LIMIT: Final = 16 * 2**20  # bytes; the status of 1024 VFs takes about 300 KB


class StatusError(Exception):
    """The status cannot be fetched or read: one sentence."""


class _LocalConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        # The path goes through a descriptor of the directory, since a socket's path is limited to 107 bytes.
        directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(TIMEOUT)
            self.sock.connect(f"/proc/self/fd/{directory}/{self._path.name}")
        finally:
            os.close(directory)


def fetch(address: HostPort) -> bytes:
    """The JSON text of http://<address>/status. Raises StatusError."""
    # The wildcard addresses, which a server can listen on, are no addresses to connect to.
    host = {"": "localhost", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104
    url = f"http://{HostPort(host, address.port)}/status"
    try:
        return _get(http.client.HTTPConnection(host, address.port, timeout=TIMEOUT), url)
    except OSError as error:
        raise StatusError(
            f"no status at {url} ({error.strerror or error}): is the server running with --status-http and "
            f"--metrics-address {address}?"
        ) from error


def fetch_local(sockets: Sequence[Path]) -> bytes:
    """The JSON text from the first of these sockets that a server listens on. Raises StatusError."""
    refusals = []
    for path in sockets:
        try:
            return _get(_LocalConnection(path), str(path))
        except OSError as error:
            refusals.append(f"{path}: {error.strerror or error}")
    raise StatusError(
        f"cannot reach the server ({'; '.join(refusals)}): is it running, is --kubelet-dir the same as the server's, "
        "and is this command run as the server's user or as root?"
    )


def decoded(text: bytes) -> Status:
    """The status in a fetched text. Raises StatusError if it has another format."""
    try:
        return decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StatusError(f"the answer is not a status of qat-plugin {VERSION}: {error}") from None


def _get(connection: http.client.HTTPConnection, source: str) -> bytes:
    """The body of /status. Raises OSError without a connection, and StatusError for any other answer."""
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        body = response.read(_LIMIT + 1)
    except http.client.HTTPException as error:
        raise StatusError(f"{source} is not served by qat-plugin ({str(error) or type(error).__name__})") from error
    finally:
        connection.close()
    if response.status == http.client.NOT_FOUND:
        raise StatusError(f"{source} does not exist: the server serves it with --status-http only")
    if response.status != http.client.OK or len(body) > _LIMIT:
        raise StatusError(f"{source} is not served by qat-plugin (HTTP status {response.status})")
    return body
