"""The scenarios of the simulated node on a third floor: the real kernel and the kubelet's own code show the same.

tests/kubelet compares both kubelets on the emulated kernel, with the same table. What differs between kernels, or
between the two together and the simulated node, shows here.
"""

from pathlib import Path
from typing import cast

import pytest

from kernel.foretold import ELSEWHERE, EVERY, FILE, OF_THE_KERNEL, seen, told
from kernel.real_node import PATIENCE, real_node
from kubelet.scenarios import SCENARIOS, AnyNode
from support.conditions import until

same_for_the_kernel = pytest.mark.skipif(
    not EVERY,
    reason="differs from one that runs in what the kubelet is told or has lost, not in what the kernel does: "
    "QAT_EVERY_SCENARIO=1 runs it too",
)
CHOSEN = [
    pytest.param(name, id=name, marks=() if name in OF_THE_KERNEL else same_for_the_kernel)
    for name in SCENARIOS
    if name not in ELSEWHERE
]


async def compare(name: str, *, fake_iommu: bool = False) -> None:
    scenario = SCENARIOS[name]
    async with real_node(
        scenario.node, scenario.options, scenario.policy, scenario.registration, fake_iommu=fake_iommu
    ) as node:
        found = await seen(scenario, cast(AnyNode, node))
    host = Path("/run/host")
    await until(lambda: told(host / FILE, name) is not None or (host / f"{FILE}.failed").exists(), PATIENCE)
    assert found == told(host / FILE, name), (host / f"{FILE}.log").read_text()


@pytest.mark.parametrize("name", CHOSEN)
async def test_the_simulated_node_does_the_same(name: str) -> None:
    await compare(name)


@pytest.mark.guest("no-iommu")
@pytest.mark.parametrize("name", sorted(ELSEWHERE))
async def test_the_simulated_node_does_the_same_with_two_domains(name: str) -> None:
    await compare(name, fake_iommu=True)
