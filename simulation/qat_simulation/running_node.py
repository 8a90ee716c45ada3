"""A whole node in one directory: the emulated kernel and kubelet, and the real helper and server processes on them.

The demo, the tests and the benchmark use it. The processes are started as users start them, by commands and options;
only the sysfs root, the kubelet's directory and the source of uevents are the simulated node's.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import h11
import msgspec

from qat_server.observability.status_format import Status
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.kubelet.kubelet import Kubelet
from qat_simulation.node.description import Node

_T = TypeVar("_T")

START_TIMEOUT: Final = 60.0
"""Seconds in which a process has to serve; long, because a busy machine is slow."""

_TREE_SPACE: Final = 256 * 1024 * 1024  # bytes: 1024 VFs have some 30000 files of one page each


class SimulationError(Exception):
    """The node did not reach an expected state: one sentence, with the end of the processes' logs where that helps."""


def command(name: str) -> list[str]:
    """The command line of qat-helper or qat-plugin, from this Python's directory, else from PATH.

    Raises SimulationError if it is not installed.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        distribution = {"qat-helper": "qat-plugin-helper", "qat-plugin": "qat-plugin-server"}.get(name, name)
        raise SimulationError(
            f"{name} is not installed: it is neither next to {sys.executable} nor on PATH;"
            f" install the distribution {distribution}"
        )
    return [found]


class Processes:
    """Helper and server on an emulated kernel and some kubelet's directory; their files are in `directory`/run.

    `helper` and `server` are the running processes, None while they are stopped. Both run as this user; a subclass that
    starts them as other users changes the commands and the server's ids.
    """

    pauses: tuple[float, float] = (0.005, 0.02)
    """Seconds between two checks of a condition, and between two requests for the server's status."""

    def __init__(self, directory: Path, kernel: Kernel, kubelet_directory: Path, server_options: Sequence[str]) -> None:
        self.directory = directory
        self.kernel = kernel
        self.kubelet_directory = kubelet_directory
        self.server_kubelet_directory = kubelet_directory  # as the server sees it
        self.server_uid, self.server_gid = os.geteuid(), os.getegid()
        self.helper: subprocess.Popen[bytes] | None = None
        self.server: subprocess.Popen[bytes] | None = None
        self.helper_options: tuple[str, ...] = ()
        self._server_options = tuple(server_options)

    def add_server_options(self, *options: str) -> None:
        """Add options for servers that are started from now on."""
        self._server_options += options

    @property
    def audit_log(self) -> Path:
        return self.directory / "run" / "audit.jsonl"

    def audit_lines(self) -> list[bytes]:
        """The complete lines of the audit log; a line that is being written is left out."""
        complete, _, _ = self.audit_log.read_bytes().rpartition(b"\n")
        return complete.splitlines()

    @property
    def helper_socket(self) -> Path:
        return self.directory / "run" / "helper.sock"

    @property
    def metrics_port(self) -> int:
        """The server's HTTP port, assigned by the system so that it is free; 0 while the server does not listen."""
        if self.server is None:
            return 0
        line = rf' {self.server.pid} \S+ "status endpoint open" addresses=\["127\.0\.0\.1:(\d+)"\]'
        found = re.search(line, self.log("server"))
        return int(found[1]) if found else 0

    def log(self, name: str) -> str:
        """The text that a process ("helper", "server") has written to stderr so far."""
        return (self.directory / "run" / f"{name}.log").read_text(errors="replace")

    def helper_command(self) -> list[str]:
        """The program and options of qat-helper."""
        return [
            *command("qat-helper"),
            f"--sysfs-root={self.kernel.sysfs_root}",
            f"--kubelet-dir={self.kubelet_directory}",
            f"--socket={self.helper_socket}",
            f"--server-uid={self.server_uid}",
            f"--server-gid={self.server_gid}",
            f"--audit-log={self.audit_log}",
            *self.helper_options,
            "--traceable",  # the emulated kernel reads what it writes
        ]

    def server_command(self) -> list[str]:
        """The program and options of qat-plugin."""
        return [
            *command("qat-plugin"),
            f"--sysfs-root={self.kernel.sysfs_root}",
            f"--kubelet-dir={self.server_kubelet_directory}",
            f"--helper-socket={self.helper_socket}",
            f"--uevents=unix:{self.kernel.uevents_path}",
            "--metrics-address=127.0.0.1:0",
            "--status-http",
            *(("--allow-root",) if self.server_uid == 0 else ()),
            *self._server_options,
        ]

    def start_helper(self) -> None:
        """Start qat-helper under the emulated kernel, without waiting until it serves."""
        with self._open_log("helper") as log:
            self.helper = self.kernel.spawn(
                self.helper_command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def start_server(self) -> None:
        """Start qat-plugin, without waiting until it is ready."""
        with self._open_log("server") as log:
            self.server = subprocess.Popen(
                self.server_command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    async def stop_server(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the server and return its exit status. Raises SimulationError if it does not end within 10 s."""
        server, self.server = self.server, None
        return await _ended("server", server, how)

    async def stop_helper(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the helper and return its exit status. Raises SimulationError if it does not end within 10 s."""
        helper, self.helper = self.helper, None
        return await _ended("helper", helper, how)

    async def end(self) -> None:
        """End the processes that still run."""
        for stop in (self.stop_server, self.stop_helper):
            with contextlib.suppress(SimulationError):
                await stop()

    async def get(self, path: str) -> tuple[int, bytes]:
        """GET from the server's HTTP endpoint, once it listens: status and body. Raises OSError if it has ended."""
        if self.server is None:  # another process may have its port by now
            raise ConnectionRefusedError("the server is not running")
        port = await self.until("the server listens", lambda: self.metrics_port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            client = h11.Connection(h11.CLIENT)
            request = h11.Request(method="GET", target=path, headers=[("Host", "node"), ("Connection", "close")])
            writer.write((client.send(request) or b"") + (client.send(h11.EndOfMessage()) or b""))
            status, body = 0, b""
            while True:
                event = client.next_event()
                if event is h11.NEED_DATA:
                    client.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                else:
                    return status, body
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def status(self) -> Status:
        """The server's /status. Raises OSError if it has ended."""
        _, body = await self.get("/status")
        return msgspec.json.decode(body, type=Status)

    async def until(self, what: str, condition: Callable[[], _T], seconds: float = START_TIMEOUT) -> _T:
        """Wait until `condition()` is true and return its value. Raises SimulationError with `what` after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            self.check_alive()
            if time.monotonic() > deadline:
                raise SimulationError(f"{what}: not within {seconds:g} s\n{self.tails()}")
            await asyncio.sleep(self.pauses[0])
        return value

    async def until_status(
        self, what: str, condition: Callable[[Status], object], seconds: float = START_TIMEOUT
    ) -> Status:
        """Wait until the server's status satisfies `condition` and return it. Raises SimulationError like `until`."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                status = await self.status()
                if condition(status):
                    return status
            self.check_alive()
            if time.monotonic() > deadline:
                raise SimulationError(f"{what}: not within {seconds:g} s\n{self.tails()}")
            await asyncio.sleep(self.pauses[1])

    def check_alive(self) -> None:
        """Raise SimulationError if one of the processes has ended unexpectedly."""
        for name, process in (("helper", self.helper), ("server", self.server)):
            if process is not None and process.poll() is not None:
                raise SimulationError(f"the {name} ended with status {process.returncode}\n{self.tails()}")

    def tails(self, lines: int = 15) -> str:
        """The last lines of both logs."""
        parts = []
        for name in ("helper", "server"):
            with contextlib.suppress(OSError):
                parts += [f"--- {name}", *self.log(name).splitlines()[-lines:]]
        return "\n".join(parts)

    def _open_log(self, name: str) -> BinaryIO:
        return open(self.directory / "run" / f"{name}.log", "ab")


class RunningNode(Processes):
    """Helper and server with the emulated kubelet. Made by `running_node`."""

    def __init__(self, directory: Path, kernel: Kernel, kubelet: Kubelet, server_options: Sequence[str]) -> None:
        super().__init__(directory, kernel, kubelet.directory, server_options)
        self.kubelet = kubelet


@asynccontextmanager
async def running_node(
    node: Node, server_options: Sequence[str] = (), directory: Path | None = None
) -> AsyncIterator[RunningNode]:
    """A node whose processes the caller starts; it ends with the block. By default `directory` is a temporary one."""
    with contextlib.ExitStack() as stack:
        if directory is None:
            # Short, because a Unix socket's path has at most 107 bytes.
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qat-", dir=short_tmp())))
        (directory / "run").mkdir(mode=0o770)
        kernel = stack.enter_context(contextlib.closing(Kernel(directory, node)))
        kubelet = Kubelet(directory / "kubelet")
        await kubelet.start()
        running = RunningNode(directory, kernel, kubelet, server_options)
        try:
            yield running
        finally:
            await running.end()
            await kubelet.stop()


async def _ended(name: str, process: "subprocess.Popen[bytes] | None", how: signal.Signals) -> int:
    if process is None:
        raise SimulationError(f"the {name} is not running")
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(how)
    try:
        return await asyncio.to_thread(process.wait, 10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise SimulationError(f"the {name} did not end within 10 s of {how.name}") from None


def short_tmp() -> str:
    """A directory with a short name, in memory if there is space: a tree on a disk is much slower than sysfs."""
    memory = "/dev/shm"  # noqa: S108
    with contextlib.suppress(OSError):
        space = os.statvfs(memory)
        if os.access(memory, os.W_OK | os.X_OK) and space.f_bavail * space.f_frsize > _TREE_SPACE:
            return memory
    return "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()  # noqa: S108
