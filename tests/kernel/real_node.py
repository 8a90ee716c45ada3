"""A node on the real kernel: both processes as in production, and the real kubelet's device manager, in the guest.

As tests/kubelet's nodes, but that /sys is the kernel's, uevents come by netlink, and everything takes its time.
"""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from kernel.real_kernel import RealKernel, real_kernel
from kubelet.answers import ContainerAllocation
from kubelet.production import ProductionNode, node_directory
from kubelet.real_kubelet import RealKubelet
from qat_server.kubelet.registration.directories import Registration
from qat_server.observability.status_format import Status
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.kubelet.topology import TopologyPolicy
from qat_simulation.node.description import Node
from qat_simulation.running_node import SimulationError
from support.helper_process import Client

PATIENCE: Final = 300.0
"""Seconds to wait for what takes a few: the guest's processors are emulated, and the host's are shared."""

_T = TypeVar("_T")


class RealNode(ProductionNode[RealKubelet]):
    """Made by `real_node`."""

    real: RealKernel
    helper_wrapper: Sequence[str] = ()
    """What the helper is started by: a mount namespace in which something is changed, for one."""
    server_wrapper: Sequence[str] = ()
    pauses = (0.05, 0.25)
    """Each look takes the emulated processors from those who are looked at."""

    def helper_command(self) -> list[str]:
        # Nobody has to look into it here, as the emulated kernel does.
        plain = [word for word in super().helper_command() if word != "--traceable"]
        return [*self.helper_wrapper, *plain, "--require-sandbox"]

    def ask(self) -> Client:
        """A connection to the helper, as the server's: of its uid, which the helper sees, and which may alone ask."""
        client = Client(self.helper_socket, uid=self.server_uid)
        client.sock.settimeout(PATIENCE)
        return client

    def audited(self, operation: str) -> list[dict[str, Any]]:
        """The lines about an operation in the audit log."""
        lines = map(json.loads, self.audit_lines())
        return [line for line in lines if line.get("operation") == operation]

    def server_command(self) -> list[str]:
        plain = [word for word in super().server_command() if not word.startswith("--uevents=")]
        return [*self.server_wrapper, *plain, "--require-sandbox"]

    async def stop_server(self, how: signal.Signals = signal.SIGTERM) -> int:
        server, self.server = self.server, None
        return await _ended(server, how)

    async def stop_helper(self, how: signal.Signals = signal.SIGTERM) -> int:
        helper, self.helper = self.helper, None
        return await _ended(helper, how)

    async def until(self, what: str, condition: Callable[[], _T], seconds: float = PATIENCE) -> _T:
        return await super().until(what, condition, seconds)

    async def until_status(self, what: str, condition: Callable[[Status], object], seconds: float = PATIENCE) -> Status:
        return await super().until_status(what, condition, seconds)

    async def wait(self, allocatable: Mapping[str, int | None], seconds: float = PATIENCE) -> None:
        await super().wait(allocatable, seconds)


async def _ended(process: "subprocess.Popen[bytes] | None", how: signal.Signals) -> int:
    """As the simulated node ends a process, but with patience."""
    if process is None:
        raise SimulationError("it is not running")
    process.send_signal(how)
    return await asyncio.to_thread(process.wait, PATIENCE)


@asynccontextmanager
async def real_node(
    node: Node,
    server_options: Sequence[str] = (),
    policy: TopologyPolicy = TopologyPolicy.BEST_EFFORT,
    registration: Registration = Registration.KUBELET_SOCKET,
    fake_iommu: bool = False,
) -> AsyncIterator[RealNode]:
    """A node with a kubelet that runs; the caller starts the processes. The kubelet's books must agree at the end."""
    with node_directory() as directory, real_kernel(node, fake_iommu) as kernel:
        kubelet = RealKubelet(directory / "kubelet", policy)
        running = RealNode(directory, cast(Kernel, kernel), kubelet, server_options, registration)
        running.real = kernel
        try:
            await kubelet.start()
            yield running
            if kubelet.alive:
                assert (await kubelet.check()).violations == ()
        finally:
            await running.end()
            await kubelet.close()


def group_of(address: str) -> int:
    """A function's IOMMU group."""
    return int(Path(f"/sys/bus/pci/devices/{address}/iommu_group").readlink().name)


IN_CONTAINER: Final = Path(__file__).with_name("in_container")


def contained(container: ContainerAllocation, *command: str) -> list[str]:
    """A command as it runs in a container that the kubelet has started with this (script in_container)."""
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--ipc", "--net"]
    variables = [f"{name}={value}" for name, value in container.envs.items()]
    nodes = [node.host_path for node in container.nodes]
    return [*namespaces, os.fspath(IN_CONTAINER), *nodes, "--", *variables, "--", *command]


class InContainer:
    """A program that runs in a container; ended by `end`."""

    def __init__(self, container: ContainerAllocation, *command: str) -> None:
        self.process = subprocess.Popen(
            contained(container, *command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    async def line(self) -> Any:
        """The next line of JSON that it prints."""
        assert self.process.stdout is not None
        text = await asyncio.to_thread(self.process.stdout.readline)
        assert text, await asyncio.to_thread(self._said)
        return json.loads(text)

    def _said(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    async def end(self) -> int:
        """Its standard input ends, and so does it: its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        status = await asyncio.to_thread(self.process.wait, PATIENCE)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return status
