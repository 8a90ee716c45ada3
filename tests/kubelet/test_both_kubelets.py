"""What the emulated kubelet does is what the real one does: the same scenarios on both, and the same seen."""

import asyncio
from pathlib import Path

import pytest
from msgspec import to_builtins

from kubelet.either import AnyKubelet, EmulatedKubelet
from kubelet.production import node_directory, on_kubelet
from kubelet.real_kubelet import RealKubelet
from kubelet.scenarios import SCENARIOS, Scenario, Seen


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
async def test_both_do_the_same(scenario: Scenario) -> None:
    with node_directory() as first, node_directory() as second:
        real, emulated = await asyncio.gather(
            seen(scenario, first, RealKubelet(first / "kubelet", scenario.policy)),
            seen(scenario, second, EmulatedKubelet(second / "kubelet", scenario.policy)),
        )
    assert to_builtins(emulated) == to_builtins(real)


async def seen(scenario: Scenario, directory: Path, kubelet: AnyKubelet) -> Seen:
    async with on_kubelet(scenario.node, directory, kubelet, scenario.options, scenario.registration) as node:
        await node.start(scenario.allocatable)
        return await scenario.run(node)
