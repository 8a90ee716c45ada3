"""Asks a running server for its status over HTTP."""

import http.client
from typing import Final

from qat_server.values import HostPort

_TIMEOUT: Final = 5.0  # seconds
_LIMIT: Final = 16 * 2**20  # bytes; 1024 VFs are some 300 KB


class StatusError(Exception):
    """There is no status to be had: one sentence."""


def fetch(address: HostPort) -> bytes:
    """The JSON text of http://<address>/status. Raises StatusError."""
    # An address to listen on everywhere is no address to connect to.
    host = {"": "localhost", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104
    place = HostPort(host, address.port)
    connection = http.client.HTTPConnection(host, address.port, timeout=_TIMEOUT)
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        body = response.read(_LIMIT + 1)
    except (OSError, http.client.HTTPException) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise StatusError(
            f"no status at http://{place}/status ({why}): is the server running with --metrics-address {address}?"
        ) from error
    finally:
        connection.close()
    if response.status != http.client.OK or len(body) > _LIMIT:
        raise StatusError(f"http://{place}/status is not a qat-plugin's (it answered {response.status})")
    return body
