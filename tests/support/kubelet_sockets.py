"""A stand-in for the helper that connects to the kubelet's sockets itself."""

import asyncio
import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qat_server.helper_client.client import HelperError, HelperUnavailableError
from qat_shared.messages import ErrorCode, KubeletService

PATHS = {
    KubeletService.REGISTRATION: "device-plugins/kubelet.sock",
    KubeletService.POD_RESOURCES: "pod-resources/kubelet.sock",
}


class DirectHelper:
    """Like the helper's OpenKubeletSocket, it waits for the socket up to `wait_ms`. If `error` is set, it is raised.

    `waiting`: the number of calls that are waiting. `requests`: the services of all calls.
    """

    def __init__(self, kubelet_directory: Path) -> None:
        self._directory = kubelet_directory
        self.requests: list[KubeletService] = []
        self.waiting = 0
        self.error: HelperError | None = None

    async def open_kubelet_socket(self, service: KubeletService, wait_ms: int = 0) -> socket.socket:
        self.requests.append(service)
        if self.error is not None:
            raise self.error
        path = self._directory / PATHS[service]
        deadline = asyncio.get_running_loop().time() + wait_ms / 1000
        while True:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connected.connect(str(path))
            except OSError as error:
                connected.close()
                if asyncio.get_running_loop().time() >= deadline:
                    raise HelperError(ErrorCode.UNAVAILABLE, f"no kubelet at {path}", error.errno or 0) from error
                self.waiting += 1
                try:
                    await asyncio.sleep(0.002)
                finally:
                    self.waiting -= 1
            else:
                return connected


def no_helper() -> HelperError:
    return HelperUnavailableError("there is no helper")


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for a socket: a Unix socket's path has 107 bytes at most."""
    directory = Path(tempfile.mkdtemp(prefix="qat-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
