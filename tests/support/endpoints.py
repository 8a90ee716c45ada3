"""Run an endpoint for a test, with either registrar, and make devices for its list."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.allocation import AllocationPolicy
from qat_server.kubelet.device import Device
from qat_server.kubelet.endpoint import Endpoint
from qat_server.kubelet.registration.registrar import Registrar, Timing
from qat_shared.pci import PciAddress


class NoUsage:
    """An PodUsage that knows nothing about pods."""

    def allocated(self) -> None:
        pass

    def stream_opened(self, reconnected: bool) -> None:
        pass

    def possibly_held(self, resource: str, allocated_at: Mapping[PciAddress, float]) -> None:
        pass


def device(number: int, reason: str = "") -> Device:
    """A VF of PF 0000:6b:00.0."""
    pf = PciAddress(0, 0x6B, 0, 0)
    nodes = (f"/dev/vfio/{number}", "/dev/vfio/vfio")
    return Device(PciAddress(0, 0x6B, 0, number), pf, 0, nodes, (), reason)


@asynccontextmanager
async def running_endpoint(
    name: str, registrar: Registrar, devices: Sequence[Device], timing: Timing | None = None
) -> AsyncIterator[Endpoint]:
    """Run the endpoint while the block runs; afterwards its socket must be gone."""
    endpoint = Endpoint(name, registrar, AllocationPolicy.NONE, Counters(), NoUsage(), timing=timing)
    endpoint.update(devices)
    task = asyncio.create_task(endpoint.run())
    try:
        yield endpoint
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not endpoint.socket_path.exists()
