"""Releasable devices: only those that the kubelet has reported, late enough, as held by no pod."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from qat_server.kubelet.device import Device, Holder, Listing
from qat_server.kubelet.pod_resources import (
    Answer,
    Holders,
    KubeletDownError,
    NoHelperError,
    PodResourcesError,
    PodResourcesUnavailableError,
)
from qat_server.kubelet.usage import GIVE_UP, SETTLE, DeviceUsage
from qat_shared.pci import PciAddress
from support.conditions import until

VF = PciAddress.parse("0000:6b:00.1")
GONE: Listing = {"cy": (Device(VF, None, None, (), (), reason="it vanished"),)}
FINE: Listing = {"cy": (Device(VF, None, None, (), ()),)}


class Kubelet:
    """A stand-in for PodResources that counts the queries."""

    def __init__(self) -> None:
        self.holders: Holders | PodResourcesError = {}
        self.pods = 1
        self.queries = 0

    async def query(self) -> Answer:
        self.queries += 1
        if isinstance(self.holders, PodResourcesError):
            raise self.holders
        return Answer(self.holders, self.pods)


async def with_usage(
    kubelet: Kubelet, settle: float, scenario: Callable[[DeviceUsage], Awaitable[None]], interval: float = 3600
) -> None:
    usage = DeviceUsage(kubelet.query, lambda: None, interval, settle)
    task = asyncio.create_task(usage.run())
    try:
        await until(lambda: kubelet.queries)
        await scenario(usage)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_device_that_no_pod_holds_is_releasable_after_it_has_settled() -> None:
    kubelet = Kubelet()

    async def scenario(usage: DeviceUsage) -> None:
        usage.track_unhealthy(GONE)
        assert not usage.confirmed_free("cy", VF), "an earlier answer does not count"
        await until(lambda: usage.confirmed_free("cy", VF))
        assert not usage.confirmed_free("dc", VF), "it is not listed there"

    await with_usage(kubelet, 0.05, scenario)
    assert kubelet.queries == 3, "two answers make it releasable"


async def test_a_held_device_stays_until_its_pod_ends() -> None:
    kubelet = Kubelet()
    kubelet.holders = {"cy": {VF: Holder("default/pod/main")}}

    async def scenario(usage: DeviceUsage) -> None:
        assert usage.holder_names() == {VF: "default/pod/main"}
        usage.track_unhealthy(GONE)
        await until(lambda: kubelet.queries >= 3)
        assert not usage.confirmed_free("cy", VF)
        kubelet.holders = {}
        await until(lambda: usage.confirmed_free("cy", VF))
        assert usage.holder_names() == {}

    await with_usage(kubelet, 0.01, scenario, interval=0.02)


async def test_a_device_that_recovers_has_to_settle_again() -> None:
    kubelet = Kubelet()

    async def scenario(usage: DeviceUsage) -> None:
        usage.track_unhealthy(GONE)
        await until(lambda: usage.confirmed_free("cy", VF))
        usage.track_unhealthy(FINE)
        assert not usage.confirmed_free("cy", VF)
        usage.track_unhealthy(GONE)
        assert not usage.confirmed_free("cy", VF)

    await with_usage(kubelet, 0.05, scenario)


async def test_without_an_answer_nothing_is_releasable() -> None:
    kubelet = Kubelet()

    async def scenario(usage: DeviceUsage) -> None:
        usage.track_unhealthy(GONE)
        await until(lambda: usage.confirmed_free("cy", VF))
        kubelet.holders = PodResourcesError("the kubelet has no such socket")
        usage.allocated()
        await until(lambda: usage.error)
        assert not usage.confirmed_free("cy", VF)
        assert usage.error == "the kubelet has no such socket"

    await with_usage(kubelet, 0.01, scenario)


async def test_an_allocated_device_may_be_held_until_the_kubelet_has_had_time_to_report_its_pod() -> None:
    kubelet = Kubelet()

    async def scenario(usage: DeviceUsage) -> None:
        allocated_at = time.monotonic()
        queries = kubelet.queries
        usage.refresh()
        await until(lambda: kubelet.queries > queries)
        await until(lambda: usage.answer_queried_at > allocated_at)
        assert usage.may_be_held("cy", VF, allocated_at), "the kubelet may not report its pod yet"
        kubelet.holders = {"cy": {VF: Holder("default/pod/main")}}
        usage.refresh()
        await until(usage.holder_names)
        assert usage.may_be_held("cy", VF, allocated_at)
        kubelet.holders = {}
        usage.refresh()
        await until(lambda: not usage.holder_names())
        assert not usage.may_be_held("cy", VF, allocated_at), "it was reported, and no longer is"
        assert usage.may_be_held("cy", VF, time.monotonic()), "but it may have been allocated again"
        assert not usage.may_be_held("cy", VF, allocated_at - 7200), "allocated long ago"

    await with_usage(kubelet, 3600, scenario)


async def test_a_refresh_notifies_even_if_the_answer_is_the_same() -> None:
    kubelet = Kubelet()
    notified = 0

    def notify() -> None:
        nonlocal notified
        notified += 1

    usage = DeviceUsage(kubelet.query, notify, 3600, 10)
    task = asyncio.create_task(usage.run())
    try:
        await until(lambda: notified == 1)
        usage.refresh()
        await until(lambda: notified == 2)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class ManualUsage:
    """A DeviceUsage whose clock and kubelet are set by the test."""

    def __init__(self, helper_timeout: float | None = None) -> None:
        self.kubelet = Kubelet()
        self.now = 0.0
        self.usage = DeviceUsage(
            self.kubelet.query, lambda: None, 3600, clock=lambda: self.now, helper_timeout=helper_timeout
        )

    async def query(self, holders: Holders | PodResourcesError, pods: int = 1, after: float = 0.0) -> bool:
        """Query after `after` seconds: whether the first listing may be published."""
        self.now += after
        self.kubelet.holders, self.kubelet.pods = holders, pods
        await self.usage.query_once()
        return self.usage.synced


async def test_the_first_listing_waits_for_a_helper_that_is_needed() -> None:
    missing = NoHelperError("the helper is not there")
    needed, not_needed = ManualUsage(), ManualUsage(helper_timeout=5)
    assert not await needed.query(missing)
    assert not await needed.query(missing, after=3600)
    assert await needed.query({})
    assert not await not_needed.query(missing)
    assert not await not_needed.query(missing, after=4.9)
    assert await not_needed.query(missing, after=0.1)


async def test_the_first_listing_waits_for_a_kubelet_that_is_down_however_long() -> None:
    for helper_timeout in (None, 5.0):
        manual = ManualUsage(helper_timeout)
        assert not await manual.query(KubeletDownError("the kubelet does not listen"))
        assert not await manual.query(KubeletDownError("the kubelet does not listen"), after=3600)
        assert await manual.query({})


async def test_the_first_listing_does_not_wait_for_an_answer_that_will_not_come() -> None:
    assert await ManualUsage().query(PodResourcesUnavailableError("the policy forbids it"))
    manual = ManualUsage()
    assert not await manual.query(PodResourcesError("the kubelet did not answer in time"))
    assert not await manual.query(PodResourcesError("the kubelet did not answer in time"), after=GIVE_UP - 0.1)
    assert await manual.query(PodResourcesError("the kubelet did not answer in time"), after=0.1)


async def test_a_kubelet_that_is_down_is_queried_again_soon() -> None:
    kubelet = Kubelet()
    kubelet.holders = KubeletDownError("the kubelet does not listen")

    async def scenario(usage: DeviceUsage) -> None:
        await until(lambda: kubelet.queries >= 3)
        kubelet.holders = {"cy": {VF: Holder("default/pod/main")}}
        await until(usage.holder_names)

    await with_usage(kubelet, 3600, scenario)


async def test_a_kubelet_that_the_helper_waited_for_is_queried_again_at_once() -> None:
    """The helper waits ten seconds. The kubelet may start just after that, and admits pods milliseconds later."""
    manual, queries = ManualUsage(), 0

    async def waited() -> Answer:
        nonlocal queries
        queries += 1
        manual.now += 10.0
        await asyncio.sleep(0)
        raise KubeletDownError("the kubelet does not listen")

    task = asyncio.create_task(DeviceUsage(waited, lambda: None, 3600, clock=lambda: manual.now).run())
    for _ in range(100):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert queries > 10


HELD: Holders = {"cy": {VF: Holder("default/pod/main")}}


async def test_a_kubelet_that_reports_no_pod_yet_releases_no_held_device() -> None:
    manual = ManualUsage()
    await manual.query(HELD)
    manual.usage.track_unhealthy(GONE)
    manual.now += 2 * SETTLE
    manual.usage.stream_opened(reconnected=True)  # the kubelet has restarted
    for _ in range(3):
        await manual.query({}, pods=0, after=2 * SETTLE)
        manual.usage.track_unhealthy(GONE)
        assert not manual.usage.confirmed_free("cy", VF)
        assert manual.usage.holder_names() == {VF: "default/pod/main"}
        assert manual.usage.may_be_held("cy", VF, None)
    await manual.query({})
    assert not manual.usage.confirmed_free("cy", VF), "one answer is not enough"
    await manual.query({})
    assert manual.usage.confirmed_free("cy", VF)
    assert manual.usage.holder_names() == {}


async def test_an_allocated_device_may_be_held_until_a_new_kubelet_reports_a_pod() -> None:
    manual = ManualUsage()
    await manual.query({})
    manual.usage.stream_opened(reconnected=True)
    await manual.query({}, pods=0, after=3600)
    assert manual.usage.may_be_held("cy", VF, -1.0), "the previous kubelet did not report it either"
    await manual.query({})
    assert not manual.usage.may_be_held("cy", VF, -1.0)


async def test_a_new_stream_restarts_the_settling_time() -> None:
    manual = ManualUsage()
    manual.usage.track_unhealthy(GONE)
    await manual.query({}, after=2 * SETTLE)
    manual.usage.stream_opened(reconnected=True)
    await manual.query({})
    assert not manual.usage.confirmed_free("cy", VF)
    await manual.query({}, after=SETTLE)
    await manual.query({})
    assert manual.usage.confirmed_free("cy", VF)


async def test_the_first_stream_is_not_a_sign_of_a_new_kubelet() -> None:
    manual = ManualUsage()
    await manual.query(HELD)
    manual.usage.stream_opened(reconnected=False)
    await manual.query({}, pods=0)
    assert manual.usage.holder_names() == {}


async def test_devices_in_use_are_those_that_pods_hold_and_those_just_allocated() -> None:
    manual, other, old = ManualUsage(), PciAddress.parse("0000:6b:00.2"), PciAddress.parse("0000:6b:00.3")
    assert manual.usage.possibly_held("cy", {}) is None
    await manual.query(HELD, after=3600)
    assert manual.usage.possibly_held("cy", {other: manual.now, old: 0.0}) == {VF, other}
    assert manual.usage.possibly_held("dc", {}) == set()
