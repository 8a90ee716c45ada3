"""A node as in production, with either kubelet: who may do what is as in a cluster, so what works here works there.

The kubelet's directories are 0750 root. The helper is uid 0 with the server's gid and no capabilities. The server is
uid and gid 65532 without capabilities, and sees of the kubelet's directories only the one that its pod mounts (the
script as_server does that). Without root to begin with, all run as one user: `why_one_user` says why.
"""

import asyncio
import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Generic, TypeAlias, TypeVar

import qat_server
import qat_shared
from kubelet.answers import Allocation as RealAllocation
from kubelet.either import AnyKubelet
from kubelet.real_kubelet import RealKubelet
from qat_server.kubelet.registration.directories import Registration
from qat_server.observability.status_format import Status
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.kubelet import kubelet as emulated
from qat_simulation.kubelet.topology import TopologyPolicy
from qat_simulation.node.description import Node
from qat_simulation.running_node import Processes, short_tmp

SERVER_ID: Final = 65532
"""The server's uid and gid."""
SOCKETS: Final = {
    Registration.KUBELET_SOCKET: "device-plugins/qat.intel.com",
    Registration.PLUGIN_WATCHER: "plugins_registry/qat.intel.com",
}
"""The one directory of the kubelet's that the server's pod mounts."""

_AS_SERVER: Final = Path(__file__).with_name("as_server")
_NO_CAPABILITIES: Final = ("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--")

Requests: TypeAlias = Sequence[tuple[str, str, int]]
"""Container, resource, number."""
Allocation: TypeAlias = RealAllocation | emulated.Allocation

K = TypeVar("K", bound=AnyKubelet)


class ProductionNode(Processes, Generic[K]):
    """Made by `production_node`."""

    def __init__(
        self,
        directory: Path,
        kernel: Kernel,
        kubelet: K,
        server_options: Sequence[str],
        registration: Registration = Registration.KUBELET_SOCKET,
    ) -> None:
        super().__init__(directory, kernel, kubelet.directory, (f"--registration={registration}", *server_options))
        self.kubelet = kubelet
        self.registration = registration
        if not why_one_user():
            self.server_kubelet_directory = directory / "server"
            self.server_uid = self.server_gid = SERVER_ID

    def helper_command(self) -> list[str]:
        plain = super().helper_command()
        if why_one_user():
            return plain
        return ["setpriv", f"--regid={self.server_gid}", "--clear-groups", *_NO_CAPABILITIES, *plain]

    def server_command(self) -> list[str]:
        plain = super().server_command()
        if why_one_user():
            return plain
        namespace = ["unshare", "--mount", "--propagation=private"]
        directories = [os.fspath(each) for each in (self.server_kubelet_directory, self.kubelet_directory)]
        return [
            *namespace,
            os.fspath(_AS_SERVER),
            *directories,
            SOCKETS[self.registration],
            "--",
            *_needed(),
            "--",
            *plain,
        ]

    @property
    def sockets(self) -> Path:
        """Where the server's sockets are."""
        return self.kubelet_directory / SOCKETS[self.registration]

    def start_helper(self) -> None:
        """The kubelet makes all volumes of a pod, DirectoryOrCreate ones too, before it starts the first container."""
        if not why_one_user():
            with contextlib.suppress(FileExistsError):
                self.sockets.mkdir(mode=0o755)
        super().start_helper()

    async def start(self, allocatable: Mapping[str, int]) -> float:
        """Start both processes, the helper first; seconds from the server's start until allocatable is so."""
        self.start_helper()
        await self.until("the helper listens", self.helper_socket.exists)
        began = time.monotonic()
        self.start_server()
        await self.wait(allocatable)
        return time.monotonic() - began

    async def start_again(self, allocatable: Mapping[str, int]) -> float:
        """Start the server alone; seconds from its start until allocatable is so."""
        began = time.monotonic()
        self.start_server()
        await self.wait(allocatable)
        return time.monotonic() - began

    async def wait(self, allocatable: Mapping[str, int | None], seconds: float = 120) -> None:
        """Until the kubelet's allocatable is so. Raises TimeoutError with what our processes said."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                await self.kubelet.wait_for(allocatable=allocatable, seconds=1)
            except TimeoutError as error:
                self.check_alive()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{error}\n{self.tails()}") from None
            else:
                return

    async def settled(self, allocatable: Mapping[str, int], seconds: float = 60) -> None:
        """Until it is so and stays so: each resource is registered by the present server as it was last, and the
        kubelet will do nothing more about it. (A kubelet that has just started may register a watched plugin twice.)
        Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while True:
            await self.wait(allocatable)
            if await self.kubelet.settled() and await self._registered() and await self.kubelet.settled():
                seen = await self.kubelet.allocatable()
                if {name: seen.get(name) for name in allocatable} == dict(allocatable):
                    return
            self.check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{dict(allocatable)} did not settle\n{self.tails()}")
            await asyncio.sleep(0.005)

    async def _registered(self) -> bool:
        with contextlib.suppress(OSError):
            return all(resource.registered for resource in (await self.status()).resources)
        return False

    async def admit(self, pod: str, requests: Requests) -> Allocation:
        """A pod whose turn comes while the kubelet or the server comes back is refused, and admitted in the end.

        As for a controller's pods: asked for again and again. Raises AdmissionError when it is refused for long.
        """
        deadline = time.monotonic() + 60
        while True:
            try:
                return await self.kubelet.allocate(pod, requests)
            except emulated.AdmissionError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.02)

    async def refused(self, pod: str, requests: Requests, why: str) -> None:
        """A pod is refused, for this reason in the end. Raises AssertionError when it is admitted."""
        deadline = time.monotonic() + 60
        while True:
            try:
                await self.kubelet.allocate(pod, requests)
            except emulated.AdmissionError as refusal:
                if why in str(refusal):
                    return
                assert time.monotonic() < deadline, f"refused with {refusal}, not with {why}"
            else:
                raise AssertionError(f"{pod} was admitted")
            await asyncio.sleep(0.02)

    async def free_in_the_end(self, allocatable: Mapping[str, int], seconds: float = 60) -> None:
        """Until so many healthy devices are free. Raises AssertionError."""
        deadline = time.monotonic() + seconds
        while (seen := await self.kubelet.allocatable_free()) != allocatable:
            assert time.monotonic() < deadline, f"free are {seen}, not {allocatable}"
            await asyncio.sleep(0.02)

    async def until_bound(self) -> Status:
        """Until every VF is bound, and the server says that it is ready."""
        return await self.until_status(
            "every VF is bound", lambda status: status.ready and all(vf.driver == "vfio-pci" for vf in status.vfs)
        )

    async def replace_server(self) -> "subprocess.Popen[bytes]":
        """Start another server beside the present one, as a rolling update does, and return the old one."""
        assert self.server is not None
        old, before = self.server, self.log("server").count("another server is running")
        self.start_server()
        await self.until(
            "the new server waits for the old one",
            lambda: self.log("server").count("another server is running") > before,
        )
        return old


@asynccontextmanager
async def production_node(
    node: Node,
    server_options: Sequence[str] = (),
    policy: TopologyPolicy = TopologyPolicy.BEST_EFFORT,
    registration: Registration = Registration.KUBELET_SOCKET,
) -> AsyncIterator[ProductionNode[RealKubelet]]:
    """A node with the real kubelet, which runs; the caller starts the processes. The books must agree at the end."""
    with node_directory() as directory:
        kubelet = RealKubelet(directory / "kubelet", policy)
        async with on_kubelet(node, directory, kubelet, server_options, registration) as it:
            yield it
            if it.kubelet.alive:
                assert (await it.kubelet.check()).violations == ()


@contextlib.contextmanager
def node_directory() -> Iterator[Path]:
    """A directory with a short name that the server may pass through, with the processes' own, run/, in it."""
    with tempfile.TemporaryDirectory(prefix="qat-", dir=short_tmp()) as made:
        directory = Path(made)
        run = directory / "run"
        run.mkdir(mode=0o770)
        if not why_one_user():
            directory.chmod(0o755)
            os.chown(run, 0, SERVER_ID)
            run.chmod(0o750)
        yield directory


@asynccontextmanager
async def on_kubelet(
    node: Node,
    directory: Path,
    kubelet: K,
    server_options: Sequence[str] = (),
    registration: Registration = Registration.KUBELET_SOCKET,
) -> AsyncIterator[ProductionNode[K]]:
    """A node in `directory`, with a kubelet that has been made but not started."""
    with contextlib.closing(Kernel(directory, node)) as kernel:
        running = ProductionNode(directory, kernel, kubelet, server_options, registration)
        try:
            await kubelet.start()
            yield running
            assert kernel.defects == []
        finally:
            await running.end()
            await kubelet.close()


@functools.cache
def why_one_user() -> str:
    """Why processes cannot run as several users here, "" if they can."""
    if os.geteuid() != 0:
        return "needs root: the helper is to run as root, the server as another user"
    trial = ["unshare", "--mount", "--propagation=private", os.fspath(_AS_SERVER)]
    with tempfile.TemporaryDirectory(dir=short_tmp()) as directory:
        (Path(directory) / "device-plugins").mkdir()
        python = [sys.executable, "-c", "import qat_server.main"]
        paths = (f"{directory}/server", directory, SOCKETS[Registration.KUBELET_SOCKET])
        done = subprocess.run(
            [*trial, *paths, "--", *_needed(), "--", *python], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        return f"needs root that may make mounts and become another user: {done.stderr.strip()}"
    return ""


@functools.cache
def _needed() -> tuple[str, ...]:
    """The directories that the server's code is in: Python's, the environment's and ours."""
    ours = (os.path.dirname(os.path.dirname(package.__file__ or "")) for package in (qat_shared, qat_server))
    found = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *ours)}
    return tuple(sorted(path for path in found if not any(path.startswith(f"{other}/") for other in found)))
