"""What the simulated node shows of the scenarios (tests/kubelet/scenarios.py): the real kernel must show the same.

`python -m kernel.foretold FILE NAME...` runs them and adds a line of JSON for each. The host does that while the guest
boots: a simulated node is quick there, and slow in a guest.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from kubelet.either import AnyKubelet, EmulatedKubelet
from kubelet.production import node_directory, on_kubelet
from kubelet.scenarios import SCENARIOS, AnyNode, Scenario

FILE = "foretold.jsonl"
"""In the directory that host and guest share."""


ELSEWHERE: Final = {"every resource"}
"""With a second PCI domain, which QEMU's IOMMU does not have: in a guest with the test module's own."""
OF_THE_KERNEL: Final = {
    *("pod after pod, restricted, packed", "too much for one NUMA node, restricted", "kubelet killed, watched"),
    *("server killed", "a pod's VF vanishes, aligned", "a pod's VF vanishes while no server runs"),
    *("nothing is healthy", "rolling update"),
}
"""In the others, what the kernel does is what it does in one of these."""
EVERY: Final = bool(os.environ.get("QAT_EVERY_SCENARIO"))


def runs(name: str) -> bool:
    """Whether a scenario is not left out here."""
    return EVERY or name in OF_THE_KERNEL | ELSEWHERE


async def seen(scenario: Scenario, node: AnyNode) -> Any:
    """Start a node's processes and run the scenario on it: what was seen, with VFs for the numbers of their groups."""
    await node.start(scenario.allocatable)
    before = node.kernel.snapshot()
    found = json.loads(msgspec.json.encode(await scenario.run(node)))
    groups = {
        str(state.iommu_group): str(vf) for each in (before, node.kernel.snapshot()) for vf, state in each.items()
    }
    return _by_vf(found, groups)


def _by_vf(value: Any, groups: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _by_vf(each, groups) for key, each in value.items()}
    if isinstance(value, list):
        nodes = value and all(isinstance(each, str) and each.startswith("/dev/") for each in value)
        replaced = [_by_vf(each, groups) for each in value]
        return sorted(replaced) if nodes else replaced
    if isinstance(value, str) and value.startswith("/dev/vfio/"):
        number = value.rpartition("/")[2]
        return f"/dev/vfio/{groups.get(number, number)}"
    return value


def told(file: Path, name: str) -> Any | None:
    """What has been written of a scenario; None when it is not there yet."""
    for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
        if line.endswith("\n") and (answer := json.loads(line))[0] == name:
            return answer[1]
    return None


async def _foretell(scenario: Scenario) -> Any:
    with node_directory() as directory:
        kubelet: AnyKubelet = EmulatedKubelet(directory / "kubelet", scenario.policy)
        async with on_kubelet(scenario.node, directory, kubelet, scenario.options, scenario.registration) as node:
            return await seen(scenario, node)


def main() -> None:
    file, *names = sys.argv[1:]
    for name in names:
        line = json.dumps([name, asyncio.run(_foretell(SCENARIOS[name]))])
        with Path(file).open("a") as out:
            out.write(f"{line}\n")


if __name__ == "__main__":
    main()
