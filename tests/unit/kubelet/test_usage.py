"""Which devices may leave a list: only after the kubelet said, late enough, that no pod holds them."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from qat_server.kubelet.device import Device, Holder, Listing
from qat_server.kubelet.pod_resources import (
    Answer,
    Holders,
    KubeletAwayError,
    NeverAnsweredError,
    NobodyToAskError,
    PodResourcesError,
)
from qat_server.kubelet.usage import PATIENCE, SETTLE, Usage
from qat_shared.pci import PciAddress
from support.conditions import until

VF = PciAddress.parse("0000:6b:00.1")
GONE: Listing = {"cy": (Device(VF, None, None, (), (), reason="it vanished"),)}
FINE: Listing = {"cy": (Device(VF, None, None, (), ()),)}


class Kubelet:
    """Stands for PodResources; counts the questions."""

    def __init__(self) -> None:
        self.holders: Holders | PodResourcesError = {}
        self.pods = 1
        self.asked = 0

    async def query(self) -> Answer:
        self.asked += 1
        if isinstance(self.holders, PodResourcesError):
            raise self.holders
        return Answer(self.holders, self.pods)


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
    assert kubelet.asked == 3, "two answers let it go"


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
        usage.ask()
        await until(lambda: told == 2)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Told:
    """A Usage whose clock is set by hand, and who holds what by its kubelet."""

    def __init__(self, without_helper: float | None = None) -> None:
        self.kubelet = Kubelet()
        self.now = 0.0
        self.usage = Usage(
            self.kubelet.query, lambda: None, 3600, clock=lambda: self.now, without_helper=without_helper
        )

    async def ask(self, holders: Holders | PodResourcesError, pods: int = 1, after: float = 0.0) -> bool:
        """Ask `after` so many seconds: whether a list may be published."""
        self.now += after
        self.kubelet.holders, self.kubelet.pods = holders, pods
        await self.usage.question()
        return self.usage.asked


async def test_the_first_list_waits_for_a_helper_for_as_long_as_it_is_needed() -> None:
    nobody = NobodyToAskError("the helper is not there")
    needed, not_needed = Told(), Told(without_helper=5)
    assert not await needed.ask(nobody)
    assert not await needed.ask(nobody, after=3600)
    assert await needed.ask({})
    assert not await not_needed.ask(nobody)
    assert not await not_needed.ask(nobody, after=4.9)
    assert await not_needed.ask(nobody, after=0.1)


async def test_the_first_list_waits_for_a_kubelet_that_is_away_however_long() -> None:
    for without_helper in (None, 5.0):
        told = Told(without_helper)
        assert not await told.ask(KubeletAwayError("the kubelet does not listen"))
        assert not await told.ask(KubeletAwayError("the kubelet does not listen"), after=3600)
        assert await told.ask({})


async def test_the_first_list_does_not_wait_for_an_answer_that_will_not_come() -> None:
    assert await Told().ask(NeverAnsweredError("the policy forbids it"))
    told = Told()
    assert not await told.ask(PodResourcesError("the kubelet did not answer in time"))
    assert not await told.ask(PodResourcesError("the kubelet did not answer in time"), after=PATIENCE - 0.1)
    assert await told.ask(PodResourcesError("the kubelet did not answer in time"), after=0.1)


async def test_a_kubelet_that_is_away_is_asked_again_soon() -> None:
    kubelet = Kubelet()
    kubelet.holders = KubeletAwayError("the kubelet does not listen")

    async def scenario(usage: Usage) -> None:
        await until(lambda: kubelet.asked >= 3)
        kubelet.holders = {"cy": {VF: Holder("default/pod/main")}}
        await until(usage.by_device)

    await with_usage(kubelet, 3600, scenario)


async def test_a_kubelet_that_was_waited_for_is_asked_again_at_once() -> None:
    """The helper waits for it for ten seconds: it may come just after them, and admits pods milliseconds later."""
    told, asked = Told(), 0

    async def waited() -> Answer:
        nonlocal asked
        asked += 1
        told.now += 10.0
        await asyncio.sleep(0)
        raise KubeletAwayError("the kubelet does not listen")

    task = asyncio.create_task(Usage(waited, lambda: None, 3600, clock=lambda: told.now).run())
    for _ in range(100):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert asked > 10


HELD: Holders = {"cy": {VF: Holder("default/pod/main")}}


async def test_a_kubelet_that_knows_no_pod_yet_lets_nothing_go_that_was_held() -> None:
    told = Told()
    await told.ask(HELD)
    told.usage.observe(GONE)
    told.now += 2 * SETTLE
    told.usage.watched(again=True)  # the kubelet was started anew
    for _ in range(3):
        await told.ask({}, pods=0, after=2 * SETTLE)
        told.usage.observe(GONE)
        assert not told.usage.releasable("cy", VF)
        assert told.usage.by_device() == {VF: "default/pod/main"}
        assert told.usage.held("cy", VF, None)
    await told.ask({})
    assert not told.usage.releasable("cy", VF), "one answer is not enough"
    await told.ask({})
    assert told.usage.releasable("cy", VF)
    assert told.usage.by_device() == {}


async def test_what_was_handed_out_is_held_until_a_new_kubelet_knows_a_pod() -> None:
    told = Told()
    await told.ask({})
    told.usage.watched(again=True)
    await told.ask({}, pods=0, after=3600)
    assert told.usage.held("cy", VF, -1.0), "and it was not shown by the kubelet before"
    await told.ask({})
    assert not told.usage.held("cy", VF, -1.0)


async def test_a_stream_that_was_opened_begins_the_time_to_settle_anew() -> None:
    told = Told()
    told.usage.observe(GONE)
    await told.ask({}, after=2 * SETTLE)
    told.usage.watched(again=True)
    await told.ask({})
    assert not told.usage.releasable("cy", VF)
    await told.ask({}, after=SETTLE)
    await told.ask({})
    assert told.usage.releasable("cy", VF)


async def test_the_first_stream_is_no_sign_of_a_new_kubelet() -> None:
    told = Told()
    await told.ask(HELD)
    told.usage.watched(again=False)
    await told.ask({}, pods=0)
    assert told.usage.by_device() == {}


async def test_in_use_is_what_pods_hold_and_what_was_just_handed_out() -> None:
    told, other, old = Told(), PciAddress.parse("0000:6b:00.2"), PciAddress.parse("0000:6b:00.3")
    assert told.usage.in_use("cy", {}) is None
    await told.ask(HELD, after=3600)
    assert told.usage.in_use("cy", {other: told.now, old: 0.0}) == {VF, other}
    assert told.usage.in_use("dc", {}) == set()
