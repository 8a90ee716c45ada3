"""Random jobs of several kinds and clients under a low limit of children: none is forgotten, and the limit holds."""

import random
from collections.abc import Callable

import pytest

from qat_helper import dispatch
from qat_helper.operations.table import OPERATIONS
from qat_shared.messages import AnyRequest, BindDriver, DpdkDriver, ReadDeviceConfig, ReadHeartbeat, ReleaseDriver
from qat_shared.pci import PciAddress
from support.dispatcher_bench import Bench, report_pid

KINDS: tuple[tuple[type[AnyRequest], Callable[[int, PciAddress], AnyRequest]], ...] = (
    (BindDriver, lambda number, address: BindDriver(id=number, address=address, driver=DpdkDriver.VFIO_PCI)),
    (ReleaseDriver, lambda number, address: ReleaseDriver(id=number, address=address)),
    (ReadHeartbeat, lambda number, address: ReadHeartbeat(id=number, address=address)),
    (ReadDeviceConfig, lambda number, address: ReadDeviceConfig(id=number, address=address)),
)


@pytest.mark.parametrize("seed", range(5))
def test_every_job_ends_and_the_limit_holds(bench: Bench, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    least = sum(row.least for row in OPERATIONS.values() if row.max_children)
    most = least + chance.randint(0, 2)
    monkeypatch.setattr(dispatch, "MAX_CHILDREN", most)
    for kind, _ in KINDS:
        bench.operation(kind, report_pid, max_children=chance.randint(1, 6))
    owners = [object() for _ in range(3)]
    asked = 0
    while asked < 120:
        for _ in range(chance.randint(1, 12)):
            asked += 1
            _, request = chance.choice(KINDS)
            bench.ask(request(asked, PciAddress(0, asked // 256, asked // 8 % 32, asked % 8)), chance.choice(owners))
            assert len(bench.calls) <= most
        wanted = chance.randint(len(bench.replies), asked)
        bench.run(lambda wanted=wanted: len(bench.replies) >= wanted)  # type: ignore[misc]
    bench.run(lambda: len(bench.replies) == asked and not bench.calls)
    assert sorted(reply.id for reply in bench.replies) == list(range(1, asked + 1))
