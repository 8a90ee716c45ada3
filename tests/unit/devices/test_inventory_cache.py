"""The inventory cache: what a refresh reads, counts and retries, and the conditions that it reports."""

import asyncio
import shutil
from pathlib import Path

import pytest

from qat_server.devices.change_queue import ChangeQueue
from qat_server.devices.inventory import Inventory
from qat_server.devices.inventory_cache import InventoryCache
from qat_server.instrumentation.conditions import Conditions
from qat_server.instrumentation.counters import Counters
from qat_shared.sysfs import SysfsError
from support.sysfs_tree import SysfsTree, address

PF, VF1, VF2 = "6b:00.0", "6b:00.1", "6b:00.2"


class Bench:
    def __init__(self, root: Path, max_devices: int = 64) -> None:
        self.tree = SysfsTree(root)
        self.tree.pf(PF)
        self.tree.vf(VF1, PF)
        self.tree.vf(VF2, PF)
        self.queue, self.conditions, self.counters = ChangeQueue(), Conditions(), Counters()
        self.cache = InventoryCache(
            self.tree.root, ("4xxxvf",), max_devices, self.queue, self.conditions, self.counters, lambda: 0.0
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "sys")


def drivers(cache: InventoryCache) -> list[str | None]:
    return [vf.driver for vf in cache.current.vfs]


async def test_a_refresh_reads_only_the_named_devices_and_a_resync_reads_all(bench: Bench) -> None:
    cache = bench.cache
    assert cache.current == Inventory((), (), (), ())
    await cache.refresh(frozenset())
    assert drivers(cache) == ["4xxxvf", "4xxxvf"], "the first refresh reads every device"
    for vf in (VF1, VF2):
        bench.tree.bind(vf, "vfio-pci")
    await cache.refresh(frozenset({address(VF1)}))
    assert drivers(cache) == ["vfio-pci", "4xxxvf"]
    assert bench.counters.resyncs == 0
    await cache.refresh(None)
    assert drivers(cache) == ["vfio-pci", "vfio-pci"]
    assert bench.counters.resyncs == 1
    assert sum(bench.counters.rescan_seconds.counts) == 3


async def test_an_unreadable_device_is_put_into_the_queue_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qat_server.devices.inventory_cache._RETRY_FIRST", 0.001)
    bench.tree.write(VF2, "device", "no number")
    await bench.cache.refresh(None)
    async with asyncio.timeout(120):
        assert await bench.queue.next() == frozenset({address(VF2)})
    for _ in range(2):
        bench.cache.report()
        bench.conditions.settle()
    (record,) = [record for record in caplog.records if record.message == "device not usable"]
    assert record.fields["address"] == address(VF2)  # type: ignore[attr-defined]

    bench.tree.write(VF2, "device", "0x4941")
    await bench.cache.refresh(frozenset())
    assert len(bench.cache.current.vfs) == 2, "a device with a problem is read again in any case"
    assert not bench.queue.pending


async def test_an_unreadable_bus_is_retried_and_the_inventory_stays(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qat_server.devices.inventory_cache._RETRY_FIRST", 0.001)
    await bench.cache.refresh(None)
    before = bench.cache.current
    shutil.move(bench.tree.root / "bus", bench.tree.root / "away")
    with pytest.raises(SysfsError):
        await bench.cache.refresh(None)
    assert bench.cache.current is before
    assert "the PCI bus cannot be read" in caplog.text
    async with asyncio.timeout(120):
        assert await bench.queue.next() is None


async def test_vfs_over_the_limit_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path / "sys", max_devices=1)
    await bench.cache.refresh(None)
    bench.cache.report()
    (record,) = caplog.records
    assert record.message.startswith("more VFs than --max-num-devices")
    assert record.fields == {  # type: ignore[attr-defined]
        "max_num_devices": 1,
        "left": 1,
        "first": address(VF2),
        "last": address(VF2),
    }


HINTS = {"a PF": (True, "enable them on a PF"), "no PF": (False, "load the PFs' kernel driver")}


@pytest.mark.parametrize(("pf", "hint"), HINTS.values(), ids=HINTS)
async def test_a_node_without_vfs_is_reported_with_a_hint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pf: bool, hint: str
) -> None:
    bench = Bench(tmp_path / "sys")
    for name in (VF1, VF2, *(() if pf else (PF,))):
        bench.tree.remove(name)
    await bench.cache.refresh(None)
    bench.cache.report_no_vfs()
    (record,) = [record for record in caplog.records if record.message == "no QAT VFs found"]
    assert record.fields["pfs"] == int(pf)  # type: ignore[attr-defined]
    assert hint in record.fields["hint"]  # type: ignore[attr-defined]
