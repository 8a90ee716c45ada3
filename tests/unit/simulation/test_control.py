"""The commands of `demo --keep` that the emulated kernel may hold up."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from qat_simulation.demo.control import Control, ControlError
from qat_simulation.demo.demo_run import DemoRun
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import Node, Pf
from support.conditions import until
from support.emulated_kernel import PF, VF, emulated


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with emulated(Node(pfs=(Pf(address=PF, total_vfs=4, vf_driver="vfio-pci"),))) as made:
        yield made


@pytest.fixture
def control(kernel: Kernel) -> Control:
    return Control(cast(DemoRun, SimpleNamespace(node=SimpleNamespace(kernel=kernel))))


@pytest.mark.parametrize(
    ("command", "gone"),
    [
        ("unbind", lambda kernel: kernel.driver(VF) is None),
        ("unplug", lambda kernel: VF not in map(str, kernel.snapshot())),
    ],
)
async def test_a_vf_that_is_open_is_released_when_it_is_closed(
    command: str, gone: "object", kernel: Kernel, control: Control
) -> None:
    assert callable(gone)
    await control.run(f"open {VF}")
    assert await control.run(f"{command} {VF}") == f"{VF} is open: the kernel waits until it is closed"
    assert await control.run(f"close {VF}") == f"{VF} is closed"
    await until(lambda: gone(kernel))


async def test_a_vf_that_is_not_open_is_released_at_once(kernel: Kernel, control: Control) -> None:
    assert await control.run(f"unbind {VF}") == f"{VF} has no driver now"
    assert kernel.driver(VF) is None
    with pytest.raises(ControlError, match="No such device"):
        await control.run(f"unbind {VF}")
