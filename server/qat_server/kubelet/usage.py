"""Which pods hold which devices, as the kubelet's PodResources says, and so which devices may leave a list.

Dropping a device that a pod holds, or that the kubelet is about to give out, can crash the kubelet (a nil dereference
in its device manager). So a device leaves only after it has been listed as Unhealthy for SETTLE seconds, so that no
allocation begun before can still be under way, and two PodResources answers asked for after that do not name it.

A kubelet that has just started names no pod until it has heard of its pods, which may take as long as the API server is
away. When a stream is opened after the end of one it may be such a one: the time to settle begins anew, and what was
known to be held is held until it has named a pod, any pod. (It names all or, but for static pods, none; where the
server is a pod itself, there is one.) Without PodResources nothing ever leaves a list while this server lives.
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
    KubeletAwayError,
    NeverAnsweredError,
    NobodyToAskError,
    PodResourcesError,
)
from qat_shared.pci import PciAddress

log = logs.get(__name__)

SETTLE: Final = 10.0
"""Seconds. The kubelet chooses devices and calls Allocate within one admission, which takes milliseconds."""
ADMITTED: Final = 3.0
"""Seconds after which a pod is named that was given a device: the kubelet has it down once Allocate has answered. One
that is not named then has ended already, or was not admitted. (Short: whoever waits for the device waits for this.)"""
PATIENCE: Final = 10.0
"""Seconds of failures after which a kubelet that runs is taken to have no answer."""
_AFTER_ALLOCATION: Final = 1.0  # the kubelet shows a pod in PodResources once it is admitted
_SECOND: Final = 1.0  # between the two answers that let a device go
_RETRY_FIRST: Final = 0.25
_RETRY_LAST: Final = 5.0
_NEVER: Final = float("-inf")
BEING_ADMITTED: Final = "a pod that is being admitted"
"""Who holds what was allocated a moment ago: PodResources may not name the pod yet."""


class _Answered(Struct, frozen=True):
    """The question's time, and who holds what by all that is known then."""

    asked_at: float = _NEVER
    holders: Holders = {}


class Usage:
    """Asks `query` when there is a reason to, and calls `on_change` when the answer differs from the last.

    `without_helper`: seconds after which a helper that is not there is not waited for any more, None for never.
    """

    def __init__(
        self,
        query: Callable[[], Awaitable[Answer]],
        on_change: Callable[[], None],
        interval: float,
        settle: float = SETTLE,
        clock: Callable[[], float] = time.monotonic,
        without_helper: float | None = None,
    ) -> None:
        self._query = query
        self._on_change = on_change
        self._interval = interval
        self._settle = settle
        self._clock = clock
        self._without_helper = without_helper
        self._unhealthy_since: dict[tuple[str, PciAddress], float] = {}
        self._told = True
        self._last = self._before = _Answered()
        self._known: Holders = {}  # of the last answer, also when it does not count any more
        self._pods_known = False  # this kubelet has named a pod
        self._watched_at = _NEVER
        self._shown: dict[tuple[str, PciAddress], float] = {}
        """When the last answer was asked for that named the device."""
        self._due = asyncio.Event()
        self._due_at = 0.0
        self._pause = _RETRY_FIRST
        self._asked_at = _NEVER
        self._failing_since: tuple[type[PodResourcesError], float] | None = None
        self.holders: Holders | None = None
        self.error = "the kubelet has not answered yet"
        self.asked = False
        """Whether there has been an answer, or it is known that none is to be had."""

    @property
    def answer_asked_at(self) -> float:
        """When, by the clock, the question was asked that the last answer is to."""
        return self._last.asked_at

    def observe(self, listing: Listing) -> None:
        """Take note of the devices that are listed as unhealthy now."""
        now = self._clock()
        unhealthy = {(name, d.address) for name, devices in listing.items() for d in devices if not d.healthy}
        self._unhealthy_since = {key: self._unhealthy_since.get(key, now) for key in unhealthy}
        self._plan()

    def allocated(self) -> None:
        """Take note that devices were handed out just now."""
        self._ask_at(self._clock() + _AFTER_ALLOCATION)

    def watched(self, again: bool) -> None:
        """Take note that the kubelet opened a stream; `again`: another ended before, so it may have just started."""
        self._watched_at = self._clock()
        if again:
            self._pods_known = False
        self.ask()

    def ask(self) -> None:
        """Ask now, and tell of the answer even if it is as the last."""
        self._told = False
        self._ask_at(self._clock())

    def releasable(self, resource: str, address: PciAddress) -> bool:
        """Whether a device of a list cannot be in use, nor be about to be."""
        since = self._unhealthy_since.get((resource, address))
        if since is None or self.holders is None or self._before.asked_at < self._settled(since):
            return False
        return all(address not in answer.holders.get(resource, {}) for answer in (self._before, self._last))

    def held(self, resource: str, address: PciAddress, handed_out_at: float | None) -> bool:
        """Whether a pod has a device of a resource, or may. `handed_out_at`: when this server last allocated it.

        Without PodResources, whatever this server has ever allocated counts as held.
        """
        if handed_out_at is not None:
            if self.holders is None:
                return True
            # Has the kubelet shown the pod that it was handed out to, it knows; else the answer may be from before.
            shown = self._shown.get((resource, address), _NEVER) > handed_out_at
            unknown = handed_out_at < self._watched_at and not self._pods_known
            if not shown and (unknown or handed_out_at > self.answer_asked_at - min(ADMITTED, self._settle)):
                return True
        return address in (self.holders or {}).get(resource, {})

    def in_use(self, resource: str, handed_out: Mapping[PciAddress, float]) -> Collection[PciAddress] | None:
        """The devices of a resource that pods hold, or may, by what was handed out when; None without PodResources."""
        if self.holders is None:
            return None
        known = self.holders.get(resource, {}).keys()
        return known | {address for address, at in handed_out.items() if self.held(resource, address, at)}

    def by_device(self) -> dict[PciAddress, str]:
        """The devices that pods are known to hold, each with its holder (namespace/pod/container)."""
        return {address: holder.name for held in (self.holders or {}).values() for address, holder in held.items()}

    def holders_of(self, listing: Listing, held: Callable[[str, PciAddress], bool]) -> dict[PciAddress, str] | None:
        """Who has, or may have, which listed device; None while the kubelet does not say. `held` is as the method."""
        if self.holders is None:
            return None
        just_now = {
            device.address: BEING_ADMITTED
            for name, devices in listing.items()
            for device in devices
            if held(name, device.address)
        }
        return just_now | self.by_device()

    async def run(self) -> None:
        """Until cancelled."""
        self._due_at = self._clock()
        while True:
            while (wait := self._due_at - self._clock()) > 0:
                self._due.clear()
                try:
                    async with asyncio.timeout(wait):
                        await self._due.wait()  # an earlier time may be set meanwhile
                except TimeoutError:
                    break
            self._due_at = self._clock() + self._interval
            await self.question()

    async def question(self) -> None:
        """Ask once."""
        asked_at, watched_at = self._clock(), self._watched_at
        self._asked_at = asked_at
        told, self._told = self._told, True
        asked = self.asked
        try:
            answer = await self._query()
        except PodResourcesError as error:
            self._failed(error)
            if not told or asked != self.asked:
                self._on_change()
            return
        self.error, self.asked = "", True
        self._pause, self._failing_since = _RETRY_FIRST, None
        if watched_at == self._watched_at:  # else it may be the word of the kubelet before
            self._pods_known = self._pods_known or answer.pods > 0
        holders = answer.holders if self._pods_known else _joined(self._known, answer.holders)
        self._before, self._last = self._last, _Answered(asked_at, holders)
        self._shown.update(((name, address), asked_at) for name, held in answer.holders.items() for address in held)
        changed = holders != self.holders
        self._known = self.holders = holders
        self._plan()
        if not told or not asked or changed or self._unhealthy_since:
            self._on_change()

    def _failed(self, error: PodResourcesError) -> None:
        now = self._clock()
        if str(error) != self.error:
            log.warning("kubelet does not say who holds devices: what vanishes stays listed", why=str(error))
        self.error = str(error)
        # What an old answer said may be wrong by now, and a device must not leave a list by it.
        self.holders = None
        self._before = self._last = _Answered()
        if self._failing_since is None or self._failing_since[0] is not type(error):
            self._failing_since = (type(error), now)
        patience, since = self._patience(error), self._failing_since[1]
        self.asked = self.asked or (patience is not None and now >= since + patience)
        if self.asked and not self._unhealthy_since and not isinstance(error, KubeletAwayError):
            return
        # One that has waited for the kubelet all that time was pause enough: it may be there in this very moment.
        retry = max(now, self._asked_at + self._pause) if isinstance(error, KubeletAwayError) else now + self._pause
        self._ask_at(retry if self.asked or patience is None else min(retry, since + patience))
        if not isinstance(error, KubeletAwayError):  # which has waited for the kubelet to be there
            self._pause = min(self._pause * 2, _RETRY_LAST)

    def _patience(self, error: PodResourcesError) -> float | None:
        """For how long such failures may go on until no answer counts as the answer, None for ever."""
        if isinstance(error, NeverAnsweredError):
            return 0.0
        if isinstance(error, KubeletAwayError):
            return None  # when it comes it will answer, and it is the one that could crash
        return self._without_helper if isinstance(error, NobodyToAskError) else PATIENCE

    def _settled(self, since: float) -> float:
        return max(since, self._watched_at) + self._settle

    def _plan(self) -> None:
        """Have the two answers asked for that let devices go."""
        for since in self._unhealthy_since.values():
            settled = self._settled(since)
            if self._last.asked_at < settled:
                self._ask_at(settled)
            elif self._before.asked_at < settled:
                self._ask_at(self._last.asked_at + min(_SECOND, self._settle))

    def _ask_at(self, when: float) -> None:
        if when < self._due_at:
            self._due_at = when
            self._due.set()


def _joined(known: Holders, named: Holders) -> Holders:
    """What was known to be held, and what is named."""
    return {name: {**known.get(name, {}), **named.get(name, {})} for name in known.keys() | named.keys()}
