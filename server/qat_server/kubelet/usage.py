"""Which pods hold which devices, according to the kubelet's PodResources, and which devices are confirmed to be free.

Removing a device that a pod holds, or that the kubelet is about to allocate, can crash the kubelet (a nil dereference
in its device manager). So `Endpoints.releasable`, which decides, needs a device to be confirmed free. Two conditions
confirm that. It has been listed as Unhealthy for SETTLE seconds, so no earlier allocation can still be in progress. And
the answers to two PodResources queries sent after that do not name it.

A kubelet that has just started reports no pod until it knows its pods, which takes as long as the API server is away.
A stream that opens after another has ended may come from such a kubelet. Then the settling time starts again, and
devices that were known to be held stay held until the kubelet has reported a pod, any pod. (It reports all or, except
for static pods, none; where the server itself is a pod, there is one.) Without PodResources no device is ever
releasable while this server lives.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Final

from msgspec import Struct

from qat_server import logs
from qat_server.kubelet.device import Listing
from qat_server.kubelet.pod_resources import (
    Answer,
    Holders,
    KubeletDownError,
    NoHelperError,
    PodResourcesError,
    PodResourcesUnavailableError,
    holder_names,
)
from qat_shared.pci import PciAddress

log = logs.get(__name__)

SETTLE: Final = 10.0
"""Seconds. The kubelet chooses devices and calls Allocate within one admission, which takes milliseconds."""
ADMISSION: Final = 3.0
"""Seconds after Allocate by which PodResources reports the pod: the kubelet records the pod once Allocate has answered.
A pod that is not reported by then has already ended, or was not admitted. (Short, since everything that waits for the
device to be free waits this long.)"""
GIVE_UP: Final = 10.0
"""Seconds of failures after which a running kubelet is assumed to have no answer."""
_AFTER_ALLOCATION: Final = 1.0  # the kubelet reports a pod in PodResources once the pod is admitted
_BETWEEN_ANSWERS: Final = 1.0  # between the two answers that make a device releasable
_RETRY_FIRST: Final = 0.25
_RETRY_LAST: Final = 5.0
_NEVER: Final = float("-inf")
BEING_ADMITTED: Final = "a pod that is being admitted"
"""The holder of a device that was allocated a moment ago: PodResources may not report the pod yet."""


class _DatedAnswer(Struct, frozen=True):
    """When the query was sent, and the holders known from its answer. `holders` is None without an answer."""

    queried_at: float = _NEVER
    holders: Holders | None = None


class DeviceUsage:
    """Runs `query` when there is a reason to, and calls `on_change` when the answer differs from the last one.

    `interval`: seconds between queries without any other reason. `settle`: see SETTLE. `helper_timeout`: seconds after
    which the first listing no longer waits for a missing helper, None for never.
    """

    def __init__(
        self,
        query: Callable[[], Awaitable[Answer]],
        on_change: Callable[[], None],
        interval: float,
        settle: float = SETTLE,
        clock: Callable[[], float] = time.monotonic,
        helper_timeout: float | None = None,
    ) -> None:
        self._query = query
        self._on_change = on_change
        self._interval = interval
        self._settle = settle
        self._clock = clock
        self._helper_timeout = helper_timeout
        self._unhealthy_since: dict[tuple[str, PciAddress], float] = {}
        self._notify_anyway = False  # call `on_change` after the next query even if the answer is the same
        self._last = self._previous = _DatedAnswer()
        self._last_known: Holders = {}  # of the last answer, kept when a later query fails
        self._pods_reported = False  # whether the present kubelet has reported a pod
        self._stream_opened_at = _NEVER
        self._last_reported: dict[tuple[str, PciAddress], float] = {}
        """When the latest answer that names the device was queried."""
        self._rescheduled = asyncio.Event()
        self._next_query_at = 0.0
        self._retry_delay = _RETRY_FIRST
        self._failing_since: tuple[type[PodResourcesError], float] | None = None
        self.error = "the kubelet has not answered yet"
        self.synced = False
        """Whether the kubelet has answered once, or is known to have no answer: the first listing waits for this."""

    @property
    def holders(self) -> Holders | None:
        """The devices that pods are known to hold, None while the kubelet does not report them."""
        return self._last.holders

    @property
    def answer_queried_at(self) -> float:
        """When the query of the last answer was sent, by the clock."""
        return self._last.queried_at

    def track_unhealthy(self, listing: Listing) -> None:
        """Record which devices are listed as unhealthy now."""
        now = self._clock()
        unhealthy = {(name, d.address) for name, devices in listing.items() for d in devices if not d.healthy}
        self._unhealthy_since = {key: self._unhealthy_since.get(key, now) for key in unhealthy}
        self._schedule_release()

    def allocated(self) -> None:
        """Devices were allocated just now."""
        self._schedule(self._clock() + _AFTER_ALLOCATION)

    def stream_opened(self, reconnected: bool) -> None:
        """The kubelet opened a stream. `reconnected`: another has ended before, so the kubelet may have restarted."""
        self._stream_opened_at = self._clock()
        if reconnected:
            self._pods_reported = False
        self.refresh()

    def refresh(self) -> None:
        """Query now, and call `on_change` even if the answer is the same as the last one."""
        self._notify_anyway = True
        self._schedule(self._clock())

    def confirmed_free(self, resource: str, address: PciAddress) -> bool:
        """Whether a listed device cannot be in use according to PodResources, nor be in an admission in progress."""
        since = self._unhealthy_since.get((resource, address))
        if since is None or self._previous.queried_at < self._settled_at(since):
            return False
        return all(address not in (answer.holders or {}).get(resource, {}) for answer in (self._previous, self._last))

    def may_be_held(self, resource: str, address: PciAddress, allocated_at: float | None) -> bool:
        """Whether a pod holds the device, or may. `allocated_at`: when this server last allocated it, None for never.

        Without PodResources, every device that this server has ever allocated may be held.
        """
        if allocated_at is not None:
            if self.holders is None:
                return True
            # If the kubelet has reported the device since that allocation, its answer holds. Otherwise the answer may
            # be older than the allocation.
            reported = self._last_reported.get((resource, address), _NEVER) > allocated_at
            unknown = allocated_at < self._stream_opened_at and not self._pods_reported
            recent = allocated_at > self.answer_queried_at - min(ADMISSION, self._settle)
            if not reported and (unknown or recent):
                return True
        return address in (self.holders or {}).get(resource, {})

    def possibly_held(self, resource: str, allocated_at: Mapping[PciAddress, float]) -> Collection[PciAddress] | None:
        """The devices of a resource that pods hold or may hold, None without PodResources.

        `allocated_at`: when this server last allocated each device.
        """
        if self.holders is None:
            return None
        known = self.holders.get(resource, {}).keys()
        return known | {address for address, at in allocated_at.items() if self.may_be_held(resource, address, at)}

    def holder_names(self) -> dict[PciAddress, str]:
        """The devices that pods are known to hold, each with its holder (namespace/pod/container)."""
        return holder_names(self.holders or {})

    async def run(self) -> None:
        """Query when one is due, until cancelled."""
        self._next_query_at = self._clock()
        while True:
            while (wait := self._next_query_at - self._clock()) > 0:
                self._rescheduled.clear()
                try:
                    async with asyncio.timeout(wait):
                        await self._rescheduled.wait()
                except TimeoutError:
                    break
            self._next_query_at = self._clock() + self._interval
            await self.query_once()

    async def query_once(self) -> None:
        """Query PodResources, and call `on_change` if there is a reason to."""
        queried_at, stream_opened_at = self._clock(), self._stream_opened_at
        notify, self._notify_anyway = self._notify_anyway, False
        synced = self.synced
        try:
            answer = await self._query()
        except PodResourcesError as error:
            self._failed(error, queried_at)
            if notify or synced != self.synced:
                self._on_change()
            return
        self.error, self.synced = "", True
        self._retry_delay, self._failing_since = _RETRY_FIRST, None
        if stream_opened_at == self._stream_opened_at:  # else the answer may be that of the previous kubelet
            self._pods_reported = self._pods_reported or answer.pods > 0
        holders = answer.holders if self._pods_reported else _merged(self._last_known, answer.holders)
        changed = holders != self.holders
        self._previous, self._last = self._last, _DatedAnswer(queried_at, holders)
        self._last_known = holders
        self._last_reported.update(
            ((name, address), queried_at) for name, held in answer.holders.items() for address in held
        )
        self._schedule_release()
        if notify or not synced or changed or self._unhealthy_since:
            self._on_change()

    def _failed(self, error: PodResourcesError, queried_at: float) -> None:
        now = self._clock()
        if str(error) != self.error:
            log.warning("kubelet does not report which pods hold devices: removed devices stay listed", why=str(error))
        self.error = str(error)
        # The old answer may be wrong by now, and must not make a device releasable.
        self._previous = self._last = _DatedAnswer()
        if self._failing_since is None or self._failing_since[0] is not type(error):
            self._failing_since = (type(error), now)
        timeout, since = self._timeout(error), self._failing_since[1]
        self.synced = self.synced or (timeout is not None and now >= since + timeout)
        kubelet_down = isinstance(error, KubeletDownError)
        if self.synced and not self._unhealthy_since and not kubelet_down:
            return
        # A query that has waited for the kubelet was itself the delay: the kubelet may start at this very moment.
        retry_at = max(now, queried_at + self._retry_delay) if kubelet_down else now + self._retry_delay
        self._schedule(retry_at if self.synced or timeout is None else min(retry_at, since + timeout))
        if not kubelet_down:
            self._retry_delay = min(self._retry_delay * 2, _RETRY_LAST)

    def _timeout(self, error: PodResourcesError) -> float | None:
        """For how many seconds the first listing waits while such failures last, None for ever."""
        if isinstance(error, PodResourcesUnavailableError):
            return 0.0
        if isinstance(error, KubeletDownError):
            return None  # a kubelet that starts will answer, and it is the one that could crash
        return self._helper_timeout if isinstance(error, NoHelperError) else GIVE_UP

    def _settled_at(self, since: float) -> float:
        return max(since, self._stream_opened_at) + self._settle

    def _schedule_release(self) -> None:
        """Schedule the two queries that can make unhealthy devices releasable."""
        for since in self._unhealthy_since.values():
            settled_at = self._settled_at(since)
            if self._last.queried_at < settled_at:
                self._schedule(settled_at)
            elif self._previous.queried_at < settled_at:
                self._schedule(self._last.queried_at + min(_BETWEEN_ANSWERS, self._settle))

    def _schedule(self, when: float) -> None:
        """Query at `when`, unless a query is due earlier."""
        if when < self._next_query_at:
            self._next_query_at = when
            self._rescheduled.set()


def _merged(known: Holders, reported: Holders) -> Holders:
    return {name: {**known.get(name, {}), **reported.get(name, {})} for name in known.keys() | reported.keys()}
