"""Which devices may leave a list: only after the kubelet said, late enough, that no pod holds them."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from qat_server.inventory import Device, Holder, Listing
from qat_server.pod_resources import NobodyToAskError, PodResourcesError
from qat_server.usage import Holders, Usage
from qat_shared.pci import PciAddress
from waiting import until

VF = PciAddress.parse("0000:6b:00.1")
GONE: Listing = {"cy": (Device(VF, None, None, (), (), reason="it vanished"),)}
FINE: Listing = {"cy": (Device(VF, None, None, (), ()),)}


class Kubelet:
    """Stands for PodResources; counts the questions."""

    def __init__(self) -> None:
        self.holders: Holders | PodResourcesError = {}
        self.asked = 0

    async def query(self) -> Holders:
        self.asked += 1
        if isinstance(self.holders, PodResourcesError):
            raise self.holders
        return self.holders


async def with_usage(
    kubelet: Kubelet, settle: float, scenario: Callable[[Usage], Awaitable[None]], interval: float = 3600
) -> None:
    usage = Usage(kubelet.query, lambda: None, interval, settle)
    task = asyncio.create_task(usage.run())
    try:
        await until(lambda: kubelet.asked)
        await scenario(usage)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_device_that_no_pod_holds_may_leave_after_it_has_settled() -> None:
    kubelet = Kubelet()

    async def scenario(usage: Usage) -> None:
        usage.observe(GONE)
        assert not usage.releasable("cy", VF), "an answer from before does not count"
        await until(lambda: usage.releasable("cy", VF))
        assert not usage.releasable("dc", VF), "it is not listed there"

    await with_usage(kubelet, 0.05, scenario)
    assert kubelet.asked == 2


async def test_a_held_device_stays_until_its_pod_ends() -> None:
    kubelet = Kubelet()
    kubelet.holders = {"cy": {VF: Holder("default/pod/main")}}

    async def scenario(usage: Usage) -> None:
        assert usage.by_device() == {VF: "default/pod/main"}
        usage.observe(GONE)
        await until(lambda: kubelet.asked >= 3)
        assert not usage.releasable("cy", VF)
        kubelet.holders = {}
        await until(lambda: usage.releasable("cy", VF))
        assert usage.by_device() == {}

    await with_usage(kubelet, 0.01, scenario, interval=0.02)


async def test_a_device_that_came_back_begins_anew() -> None:
    kubelet = Kubelet()

    async def scenario(usage: Usage) -> None:
        usage.observe(GONE)
        await until(lambda: usage.releasable("cy", VF))
        usage.observe(FINE)
        assert not usage.releasable("cy", VF)
        usage.observe(GONE)
        assert not usage.releasable("cy", VF)

    await with_usage(kubelet, 0.05, scenario)


async def test_without_an_answer_nothing_leaves() -> None:
    kubelet = Kubelet()

    async def scenario(usage: Usage) -> None:
        usage.observe(GONE)
        await until(lambda: usage.releasable("cy", VF))
        kubelet.holders = PodResourcesError("the kubelet has no such socket")
        usage.allocated()
        await until(lambda: usage.error)
        assert not usage.releasable("cy", VF)
        assert usage.error == "the kubelet has no such socket"

    await with_usage(kubelet, 0.01, scenario)


async def test_what_was_handed_out_is_held_until_the_kubelet_has_shown_its_pod_or_had_the_time_to() -> None:
    kubelet = Kubelet()

    async def scenario(usage: Usage) -> None:
        handed_out_at = time.monotonic()
        asked = kubelet.asked
        usage.ask()
        await until(lambda: kubelet.asked > asked)
        await until(lambda: usage.answer_asked_at > handed_out_at)
        assert usage.held("cy", VF, handed_out_at), "the kubelet may not know yet"
        kubelet.holders = {"cy": {VF: Holder("default/pod/main")}}
        usage.ask()
        await until(usage.by_device)
        assert usage.held("cy", VF, handed_out_at)
        kubelet.holders = {}
        usage.ask()
        await until(lambda: not usage.by_device())
        assert not usage.held("cy", VF, handed_out_at), "it was shown, and is not any more"
        assert usage.held("cy", VF, time.monotonic()), "but it may have been handed out again"
        assert not usage.held("cy", VF, handed_out_at - 7200), "handed out long ago"

    await with_usage(kubelet, 3600, scenario)


async def test_who_asks_is_told_even_if_nothing_has_changed() -> None:
    kubelet = Kubelet()
    told = 0

    def tell() -> None:
        nonlocal told
        told += 1

    usage = Usage(kubelet.query, tell, 3600, 10)
    task = asyncio.create_task(usage.run())
    try:
        await until(lambda: told == 1)
        usage.ask(tell=True)
        await until(lambda: told == 2)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_without_a_helper_the_kubelet_was_not_asked() -> None:
    kubelet = Kubelet()
    kubelet.holders = NobodyToAskError("the helper is not there")
    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    usage = Usage(kubelet.query, changed, 3600)
    task = asyncio.create_task(usage.run())
    await until(lambda: changes)
    assert (usage.attempted, usage.asked, changes) == (True, False, 1)
    usage.ask()
    await until(lambda: kubelet.asked == 2)
    kubelet.holders = PodResourcesError("the kubelet has no such service")
    usage.ask()
    await until(lambda: usage.asked)
    assert (kubelet.asked, changes) == (3, 2), "what has not changed is not told again"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
