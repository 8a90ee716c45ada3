"""A node on the real kernel: both processes as in production, and the real kubelet's device manager, in the guest.

As tests/kubelet's nodes, but that /sys is the kernel's, uevents come by netlink, and everything takes its time.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar, cast

from kernel.real_kernel import RealKernel, real_kernel
from kubelet.production import ProductionNode, node_directory
from kubelet.real_kubelet import RealKubelet
from qat_server.settings import Registration
from qat_server.simulation.kernel import Kernel
from qat_server.simulation.node import Node
from qat_server.simulation.topology import TopologyPolicy
from qat_server.status import Status

PATIENCE: Final = 150.0
"""Seconds to wait for what takes a few: the guest's processors are emulated, and the host's are shared."""

_T = TypeVar("_T")


class RealNode(ProductionNode[RealKubelet]):
    """Made by `real_node`."""

    real: RealKernel

    def server_command(self) -> list[str]:
        return [word for word in super().server_command() if not word.startswith("--uevents=")]

    async def until(self, what: str, condition: Callable[[], _T], seconds: float = PATIENCE) -> _T:
        return await super().until(what, condition, seconds)

    async def until_status(
        self, what: str, condition: Callable[[Status], object], seconds: float = PATIENCE
    ) -> Status:
        return await super().until_status(what, condition, seconds)

    async def wait(self, allocatable: Mapping[str, int | None], seconds: float = PATIENCE) -> None:
        await super().wait(allocatable, seconds)


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
