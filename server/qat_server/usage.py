"""Which pods hold which devices, as the kubelet's PodResources says, and so which devices may leave a list.

Dropping a device that a pod holds, or that the kubelet is about to give out, can crash the kubelet (a nil dereference
in its device manager). So a device leaves only after it has been listed as Unhealthy for SETTLE seconds, so that no
allocation begun before can still be under way, and a PodResources answer asked for after that does not name it. Without
PodResources nothing ever leaves a list while this server lives.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from qat_server import logs
from qat_server.inventory import Holder, Listing
from qat_server.pod_resources import NobodyToAskError, PodResourcesError
from qat_shared.pci import PciAddress

log = logs.get(__name__)

SETTLE: Final = 10.0
"""Seconds. The kubelet chooses devices and calls Allocate within one admission, which takes milliseconds."""
_AFTER_ALLOCATION: Final = 1.0  # the kubelet shows a pod in PodResources once it is admitted
_RETRY: Final = 5.0
BEING_ADMITTED: Final = "a pod that is being admitted"
"""Who holds what was allocated a moment ago: PodResources may not name the pod yet."""

Holders = Mapping[str, Mapping[PciAddress, Holder]]
"""Resource name to device to its holder."""


class Usage:
    """Asks `query` when there is a reason to, and calls `on_change` when the answer differs from the last."""

    def __init__(
        self,
        query: Callable[[], Awaitable[Holders]],
        on_change: Callable[[], None],
        interval: float,
        settle: float = SETTLE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._query = query
        self._on_change = on_change
        self._interval = interval
        self._settle = settle
        self._clock = clock
        self._unhealthy_since: dict[tuple[str, PciAddress], float] = {}
        self._tell = False
        self.answer_asked_at = float("-inf")
        """When, by the clock, the question was asked that the last answer is to."""
        self._shown: dict[tuple[str, PciAddress], float] = {}
        """When the last answer was asked for that named the device."""
        self._due = asyncio.Event()
        self._due_at = 0.0
        self.holders: Holders | None = None
        self.error = "not asked yet"
        self.attempted = False
        """Whether a question has ended, however."""
        self.asked = False
        """Whether there has been an answer, or none to be had, though there was a helper to ask through."""

    def observe(self, listing: Listing) -> None:
        """Take note of the devices that are listed as unhealthy now."""
        now = self._clock()
        unhealthy = {(name, d.address) for name, devices in listing.items() for d in devices if not d.healthy}
        self._unhealthy_since = {key: self._unhealthy_since.get(key, now) for key in unhealthy}
        waiting = [since + self._settle for since in self._unhealthy_since.values()]
        fresh = [at for at in waiting if at > self.answer_asked_at]
        if fresh:
            self._ask_at(min(fresh))

    def allocated(self) -> None:
        """Take note that devices were handed out just now."""
        self._ask_at(self._clock() + _AFTER_ALLOCATION)

    def ask(self, tell: bool = False) -> None:
        """Ask soon: the kubelet may be reached again. `tell` of the answer even if it is as the last."""
        self._tell = self._tell or tell
        self._ask_at(self._clock())

    def releasable(self, resource: str, address: PciAddress) -> bool:
        """Whether a device of a list cannot be in use, nor be about to be."""
        since = self._unhealthy_since.get((resource, address))
        if since is None or self.holders is None or self.answer_asked_at < since + self._settle:
            return False
        return address not in self.holders.get(resource, {})

    def held(self, resource: str, address: PciAddress, handed_out_at: float | None) -> bool:
        """Whether a pod has a device of a resource, or may. `handed_out_at`: when this server last allocated it.

        Without PodResources, whatever this server has ever allocated counts as held.
        """
        if handed_out_at is not None:
            if self.holders is None:
                return True
            # Has the kubelet shown the pod that it was handed out to, it knows; else the answer may be from before.
            shown = self._shown.get((resource, address), float("-inf")) > handed_out_at
            if not shown and handed_out_at > self.answer_asked_at - self._settle:
                return True
        return address in (self.holders or {}).get(resource, {})

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
            await self._ask()

    async def _ask(self) -> None:
        asked_at = self._clock()
        before, tell, self._tell = (self.attempted, self.asked), self._tell, False
        try:
            holders = await self._query()
        except PodResourcesError as error:
            if str(error) != self.error:
                log.warning(
                    "kubelet does not say who holds devices: what vanishes stays listed",
                    why=str(error),
                )
            self.error = str(error)
            # What an old answer said may be wrong by now, and a device must not leave a list by it.
            self.holders = None
            self.attempted = True
            self.asked = self.asked or not isinstance(error, NobodyToAskError)
            if tell or before != (self.attempted, self.asked):
                self._on_change()
            if self._unhealthy_since:
                self._ask_at(asked_at + _RETRY)
            return
        self.error = ""
        self.answer_asked_at = asked_at
        self.attempted = self.asked = True
        self._shown.update(((name, address), asked_at) for name, held in holders.items() for address in held)
        changed = holders != self.holders
        self.holders = holders
        if tell or not before[1] or changed or self._unhealthy_since:
            self._on_change()

    def _ask_at(self, when: float) -> None:
        if when < self._due_at:
            self._due_at = when
            self._due.set()
