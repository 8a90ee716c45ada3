"""What the real and the emulated kubelet have in common, for tests that run on both."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from kubelet.answers import Allocation as RealAllocation
from kubelet.real_kubelet import Damage, damage_checkpoint
from qat_simulation.kubelet.kubelet import Allocation, Kubelet
from qat_simulation.kubelet.topology import TopologyPolicy


class AnyKubelet(Protocol):
    """As RealKubelet, which has more."""

    directory: Path

    async def start(self) -> object: ...

    async def stop(self, kill: bool = False) -> None: ...

    async def restart(self, kill: bool = False) -> object: ...

    async def close(self) -> None: ...

    async def capacity(self) -> dict[str, int]: ...

    async def allocatable(self) -> dict[str, int]: ...

    async def allocatable_free(self) -> dict[str, int]: ...

    async def wait_for(
        self,
        *,
        capacity: Mapping[str, int | None] | None = None,
        allocatable: Mapping[str, int | None] | None = None,
        seconds: float = 20,
    ) -> object: ...

    async def allocate(self, pod: str, requests: Sequence[tuple[str, str, int]]) -> Allocation | RealAllocation: ...

    async def free(self, pod: str) -> None: ...

    async def devices_of(self, pod: str) -> set[str]: ...

    async def settled(self) -> bool: ...

    def damage_checkpoint(self, damage: Damage = "garbage") -> None: ...


class EmulatedKubelet:
    """The emulated kubelet with RealKubelet's methods."""

    def __init__(self, directory: Path, policy: TopologyPolicy = TopologyPolicy.BEST_EFFORT, numa: int = 2) -> None:
        self.directory = directory
        self.kubelet = Kubelet(directory, policy, range(numa))

    async def start(self) -> None:
        await self.kubelet.start()

    async def stop(self, kill: bool = False) -> None:
        await self.kubelet.stop(kill)

    async def restart(self, kill: bool = False) -> None:
        await self.kubelet.restart(kill)

    async def close(self) -> None:
        if self.kubelet.running:
            await self.kubelet.stop()

    async def capacity(self) -> dict[str, int]:
        return self.kubelet.capacity()

    async def allocatable(self) -> dict[str, int]:
        return self.kubelet.allocatable()

    async def allocatable_free(self) -> dict[str, int]:
        return self.kubelet.allocatable_free()

    async def wait_for(
        self,
        *,
        capacity: Mapping[str, int | None] | None = None,
        allocatable: Mapping[str, int | None] | None = None,
        seconds: float = 20,
    ) -> None:
        def so() -> bool:
            capacities, allocatables = self.kubelet.capacity(), self.kubelet.allocatable()
            return all(capacities.get(name) == number for name, number in (capacity or {}).items()) and all(
                allocatables.get(name) == number for name, number in (allocatable or {}).items()
            )

        await self.kubelet.wait_for(so, seconds)

    async def allocate(self, pod: str, requests: Sequence[tuple[str, str, int]]) -> Allocation:
        return await self.kubelet.allocate(pod, requests)

    async def free(self, pod: str) -> None:
        self.kubelet.free(pod)
        await asyncio.sleep(0)

    async def devices_of(self, pod: str) -> set[str]:
        return self.kubelet.devices_of(pod)

    async def settled(self) -> bool:
        return self.kubelet.settled

    def damage_checkpoint(self, damage: Damage = "garbage") -> None:
        damage_checkpoint(self.directory / "device-plugins", damage)
