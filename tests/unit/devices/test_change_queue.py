"""The change queue: a burst comes out as one change, and unreadable devices are put into it again."""

import asyncio
from collections.abc import Callable

import pytest

from qat_server.devices.change_queue import ChangeQueue
from qat_server.devices.inventory_cache import RescanBackoff
from qat_shared.pci import PciAddress

VF = PciAddress.parse("0000:6b:00.1")


async def test_a_burst_comes_out_as_one_change() -> None:
    queue = ChangeQueue()
    other = PciAddress(1, 2, 3, 4)
    queue.rescan(VF)
    queue.rescan(other)
    queue.rescan(VF)
    assert await queue.next() == frozenset({VF, other})
    queue.rescan(VF)
    queue.rescan()
    assert await queue.next() is None
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.next(), 0.05)


async def test_an_unreadable_device_is_rescanned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_server.devices.inventory_cache._RETRY_FIRST", 0.001)
    queue, address = ChangeQueue(), PciAddress(0, 0x6B, 0, 1)
    backoff = RescanBackoff(queue)
    async with asyncio.timeout(120):
        backoff.update([address])
        assert await queue.next() == frozenset([address])
        backoff.update([None])
        assert await queue.next() is None
    backoff.update([address])
    backoff.update([])  # it was readable in the meantime
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await queue.next()


CHANGES: dict[str, tuple[Callable[[ChangeQueue], None], frozenset[PciAddress] | None]] = {
    "a device": (lambda queue: queue.rescan(VF), frozenset({VF})),
    "every device": (lambda queue: queue.rescan(), None),
    "a reconcile": (lambda queue: queue.reconcile(), frozenset()),
    "a device, or a reconcile": (lambda queue: queue.rescan_or_reconcile(VF), frozenset({VF})),
    "no device, so a reconcile": (lambda queue: queue.rescan_or_reconcile(None), frozenset()),
}


@pytest.mark.parametrize(("change", "devices"), CHANGES.values(), ids=CHANGES)
async def test_a_change_is_pending_until_it_is_taken(
    change: Callable[[ChangeQueue], None], devices: frozenset[PciAddress] | None
) -> None:
    queue = ChangeQueue()
    assert (queue.pending, queue.unfinished()) == (False, [])
    change(queue)
    assert (queue.pending, queue.unfinished()) == (True, ["devices have changed and are being read again"])
    async with asyncio.timeout(120):
        assert await queue.next() == devices
    assert (queue.pending, queue.unfinished()) == (False, [])


async def test_a_resync_rescans_every_device() -> None:
    queue = ChangeQueue()
    queue.rescan(VF)
    resync = asyncio.create_task(queue.resync(0.0))
    try:
        async with asyncio.timeout(120):
            while await queue.next() is not None:
                pass
    finally:
        resync.cancel()
        await asyncio.gather(resync, return_exceptions=True)
