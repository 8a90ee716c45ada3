"""The provisioning of a running server: each PF by itself on the way from what it is to what is wanted of it.

Theory of operation: `look` is a part of every look at the devices. It plans anew from nothing but the devices' state,
and starts the steps of each PF that may be changed in a task of its own; its end asks for a new look. So whatever was
interrupted, wherever, is taken up by the next look.

A PF whose VFs would be taken away is changed only when nobody can have one: no pod by PodResources, no process by the
kernel. That must stay so: first its VFs are `withheld` (the kubelet is told, and Allocate refuses them), then
PodResources is asked once more, and only if the answer still names none of them the steps begin. While pods have some,
the PF waits; that they have gone is seen by looking again and again, since no event tells it.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from qat_server import logs
from qat_server.devices.inventory import Inventory, PhysicalFunction
from qat_server.helper_client.backoff import Backoff, WakeUp
from qat_server.helper_client.client import HelperClient, HelperError, HelperUnavailableError
from qat_server.kubelet.usage import BEING_ADMITTED, DeviceUsage
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.plan import PfPlan, Step, plan
from qat_server.provisioning.progress import Progress, Stage
from qat_server.provisioning.qat_conf import Services
from qat_server.provisioning.state import read_states
from qat_server.provisioning.steps import carry_out, is_refused, takes_vfs_away, why
from qat_server.provisioning.table import wanted_text
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress

log = logs.get(__name__)

POLL: Final = 0.5
"""Seconds between two looks at whether VFs that are waited for are still open."""
_ASK_LAST: Final = 15.0  # the longest pause between two questions to the kubelet

Holders = Mapping[PciAddress, str]


class Provisioner:
    """Carries out what is wanted. `on_change` asks for a look at a device, or (None) for the known ones to be judged.

    `progress` is each PF's; `withheld` are the VFs that must not be given to pods now, with the reason.
    """

    def __init__(
        self,
        helper: HelperClient,
        sysfs_root: Path,
        usage: DeviceUsage,
        on_change: Callable[[PciAddress | None], None],
        drain: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._helper = helper
        self._sysfs_root = sysfs_root
        self._usage = usage
        self._on_change = on_change
        self._drain = drain
        self._clock = clock
        self.progress: dict[PciAddress, Progress] = {}
        self.withheld: dict[PciAddress, str] = {}
        self._configuration: Configuration | None = None
        self._running: set[PciAddress] = set()
        self._closing: set[PciAddress] = set()
        self._closed: dict[PciAddress, float] = {}  # PF: since when the kubelet has been told
        self._undecided: set[PciAddress] = set()
        self._with_services: set[PciAddress] = set()  # the PFs whose driver shows services
        self._backoff = Backoff()
        self._failures: dict[PciAddress, tuple[Stage, str]] = {}
        self._denied: dict[PciAddress, str] = {}
        self._refused: dict[PciAddress, Services] = {}
        self._said: set[tuple[PciAddress | None, str]] = set()
        self._waits: dict[PciAddress, str] = {}
        self._watched: object = None
        self._ask_at, self._pause = 0.0, POLL
        self._wake_up = WakeUp(lambda: on_change(None), clock)

    @property
    def working(self) -> tuple[PciAddress, ...]:
        """The PFs that are being changed."""
        return tuple(sorted(self._running))

    def settled(self, pfs: Sequence[PhysicalFunction]) -> list[PhysicalFunction]:
        """The PFs that are not being changed: the others cannot be judged."""
        return [pf for pf in pfs if pf.address not in self._running]

    def missing(self) -> list[str]:
        """A sentence for each PF that is not provisioned yet, and that a moment may bring to it."""
        # These stay as they are until the kubelet, the configuration or the helper's policy changes.
        stays = self._undecided | self._denied.keys() | self._refused.keys()
        return [
            f"PF {address} is not provisioned: {one.reason or one.stage}"
            for address, one in sorted(self.progress.items())
            if address not in stays
            and one.stage not in (Stage.DONE, Stage.WAITING)
            # Attributes come after the driver's link: until then a PF only seems impossible to provision.
            and (one.stage is not Stage.IMPOSSIBLE or address not in self._with_services)
        ]

    def may_be_bound(self, inventory: Inventory, vfs: Iterable[PciAddress]) -> list[PciAddress]:
        """These VFs without those that are about to be taken away."""
        changing = self._running | self._closing | self._closed.keys() | self._undecided
        going = {vf for pf in inventory.pfs if pf.address in changing for vf in pf.vfs}
        return [vf for vf in vfs if vf not in going]

    async def reconcile(
        self,
        inventory: Inventory,
        configuration: Configuration | None,
        holders: Callable[[], Holders | None],
        work: asyncio.TaskGroup,
    ) -> None:
        """See what is wanted of each PF and not so, and begin what can be done, in tasks of `work`."""
        if configuration is None:
            return
        if configuration != self._configuration:
            self._configuration = configuration
            self._backoff, self._failures, self._refused, self._denied = Backoff(), {}, {}, {}
            self._said.clear()
        self._with_services = {pf.address for pf in inventory.pfs if pf.services is not None}
        settled = self.settled(inventory.pfs)
        states = await asyncio.to_thread(read_states, self._sysfs_root, settled, False)
        planned = plan(inventory, states, configuration, holders(), self._refused)
        concerned = [one.pf for one in planned.pfs if one.later or any(map(takes_vfs_away, one.steps))]
        if concerned:  # mostly there are none, and nobody has to know which VFs are open
            states.update(await asyncio.to_thread(read_states, self._sysfs_root, concerned))
            planned = plan(inventory, states, configuration, holders(), self._refused)
        self._undecided.clear()
        self._forget_gone(one.pf.address for one in planned.pfs)
        for note in planned.notes:
            self._say_once(None, "provisioning configuration", note)
        for one in planned.pfs:
            address = one.pf.address
            if address in self._running or address not in states:
                continue
            if not self._usage.synced and one.pf.vfs and (one.steps or one.later):
                self._undecided.add(address)  # whether pods have some will soon be known
                continue
            progress = self._judge(one, work)
            before, self.progress[address] = self.progress.get(address), progress
            if before is not None and before.stage != Stage.DONE == progress.stage:
                log.info("PF is as wanted", pf=address, wanted=progress.wanted)
        self.withheld = self._withhold(planned.pfs)
        self._wake([one for one in planned.pfs if one.waiting and one.pf.address not in self._running])

    def helper_changed(self) -> None:
        """Another helper, another policy: what was denied may be allowed now, and what failed may go on."""
        self._backoff, self._denied = Backoff(), {}

    def published(self) -> None:
        """The kubelet has been told what is withheld now."""
        if self._closing:
            self._closed.update(dict.fromkeys(self._closing, self._clock()))
            self._closing.clear()
            self._usage.refresh()

    def _judge(self, one: PfPlan, work: asyncio.TaskGroup) -> Progress:
        address, wanted = one.pf.address, wanted_text(one.wanted)
        steps = tuple(map(str, (*one.steps, *one.later)))
        for note in one.notes:
            self._say_once(address, "PF provisioned in part", note)
        self._say_waits(one)
        taking = bool(one.pf.vfs) and any(map(takes_vfs_away, one.steps))
        if not taking:
            self._closing.discard(address)
            self._closed.pop(address, None)
        if one.impossible:
            self._say_once(address, "PF cannot be what is wanted", one.impossible)
            return Progress(Stage.IMPOSSIBLE, wanted, reason=one.impossible)
        if not steps:
            self._backoff = self._backoff.without(address)
            self._failures.pop(address, None)
            return Progress(Stage.FAILED if one.refused else Stage.DONE, wanted, reason=one.refused)
        if not one.steps:
            return Progress(Stage.WAITING, wanted, steps, _names(one))
        if not self._helper.connected or address in self._denied:
            self._closing.discard(address)
            self._closed.pop(address, None)
            why_not = self._helper.error or self._denied[address]
            return Progress(Stage.FAILED, wanted, steps, _names(one), why_not)
        if not self._backoff.due(address, self._clock()):
            stage, failure = self._failures.get(address, (Stage.WORKING, ""))
            return Progress(stage, wanted, steps, _names(one), failure)
        if taking and not self._nobody_can_have_one(address):
            return Progress(Stage.WORKING, wanted, steps)
        self._running.add(address)
        # Counted as failed until it is seen to be as wanted: what does not stick must not be tried without a pause.
        self._backoff = self._backoff.failed(address, self._clock())
        work.create_task(self._carry_out(one))
        return Progress(Stage.WORKING, wanted, steps, _names(one))

    def _nobody_can_have_one(self, address: PciAddress) -> bool:
        """The plan has just said that nobody has one: whether none can have been given out since it was made."""
        closed = self._closed.get(address)
        if closed is None:
            self._closing.add(address)
            return False
        return self._usage.answer_queried_at > closed

    async def _carry_out(self, one: PfPlan) -> None:
        address = one.pf.address
        try:
            for step in one.steps:
                try:
                    done = await carry_out(self._helper, step)
                except HelperUnavailableError:
                    self._backoff = self._backoff.without(address)
                    return  # a look is asked for when it is back
                except HelperError as error:
                    self._failed(step, error)
                    return
                except Exception as error:  # a defect must not end what is served
                    log.exception("provisioning failed", pf=address, step=str(step))
                    self._failures[address] = (Stage.FAILED, f"{step}: a defect of this server: {error!r}")
                    return
                log.info("PF changed", pf=address, step=str(step), before=done.before, now=done.now)
            self._failures.pop(address, None)
        finally:
            self._running.discard(address)
            self._closed.pop(address, None)
            for each in (address, *one.pf.vfs):
                self._on_change(each)

    def _failed(self, step: Step, error: HelperError) -> None:
        address, text = step.address, why(step, error)
        if is_refused(step, error):
            self._refused[address] = getattr(step, "services", ())
            self._backoff = self._backoff.without(address)
        if error.code == ErrorCode.DENIED:  # nothing that another attempt would change
            self._denied[address] = text
        busy = error.code in (ErrorCode.BUSY, ErrorCode.TIMED_OUT)
        failure = (Stage.BUSY if busy else Stage.FAILED, text)
        if self._failures.get(address) != failure:
            write = log.info if busy else log.error
            write("PF not changed", pf=address, code=error.code, why=text)
        self._failures[address] = failure

    def _withhold(self, planned: Sequence[PfPlan]) -> dict[PciAddress, str]:
        withheld = {}
        for one in planned:
            address = one.pf.address
            if address in self._running or address in self._closing or address in self._closed:
                withheld.update(dict.fromkeys(one.pf.vfs, f"PF {address} is being provisioned"))
            elif self._drain and one.waiting:
                held = {hold.vf for hold in one.waiting}
                reason = f"PF {address} is drained: it is provisioned when its other VFs are free"
                withheld.update((vf, reason) for vf in one.pf.vfs if vf not in held)
        return withheld

    def _wake(self, waiting: Sequence[PfPlan]) -> None:
        """Have a look again when something may have changed that no event tells."""
        now = self._clock()
        due = self._backoff.next_due(now)
        if waiting:
            due = min(due or now + POLL, now + POLL)
            seen = [(one.pf.address, one.waiting, one.state and one.state.open_vfs) for one in waiting]
            if seen != self._watched:
                self._watched, self._ask_at, self._pause = seen, now, POLL
            # Where a VF is open, the kernel tells first when it is not any more.
            if now >= self._ask_at and any(one.state and not one.state.open_vfs for one in waiting):
                self._usage.refresh()
                # That one is being admitted is known for some seconds at most: its pod shows, or it has gone.
                admitted = any(BEING_ADMITTED in _names(one) for one in waiting)
                self._pause = POLL if admitted else min(self._pause * 2, _ASK_LAST)
                self._ask_at = now + self._pause
        self._wake_up.at(due)

    def _say_waits(self, one: PfPlan) -> None:
        if BEING_ADMITTED in (names := _names(one)):
            return  # a moment later it has a name
        what = ", ".join(map(str, one.later))
        before, self._waits[one.pf.address] = self._waits.get(one.pf.address, ""), what
        if what and what != before:
            log.info("PF waits until its VFs are free", pf=one.pf.address, steps=what, held_by=names)

    def _say_once(self, address: PciAddress | None, message: str, text: str) -> None:
        if (address, text) not in self._said:
            self._said.add((address, text))
            log.warning(message, pf=address, why=text)

    def _forget_gone(self, there: Iterable[PciAddress]) -> None:
        known = set(there) | self._running
        for gone in self.progress.keys() - known:
            del self.progress[gone]
            for table in (self._failures, self._refused, self._denied, self._closed, self._waits):
                table.pop(gone, None)
        self._backoff = self._backoff.keep(known)


def _names(one: PfPlan) -> tuple[str, ...]:
    return tuple(dict.fromkeys(hold.holder for hold in one.waiting))
