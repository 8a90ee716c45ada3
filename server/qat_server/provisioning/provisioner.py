"""The provisioning of a running server: brings each PF, independently of the others, to its desired state.

Theory of operation: `reconcile` is a part of every reconcile of the server. It recomputes the plan from nothing but the
state of the devices. For each PF that may be changed it starts a task that carries out the steps; the end of the task
requests another reconcile. So the next reconcile resumes whatever was interrupted, at any point.

Steps that remove a PF's VFs begin only when nobody can hold one: no pod according to PodResources, and no process
according to the kernel. That must remain true until the steps have begun, so this order is fixed. First the VFs are
`withheld`: the kubelet sees them as unhealthy, and Allocate refuses them. Then PodResources is queried once more, and
the steps begin only if that answer names none of the VFs. While pods hold VFs, the PF waits. No event reports that they
are free again, so a waiting PF is polled.
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
from qat_server.provisioning.actual_state import read_actual_states
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.execute import execute, failure_text, refused_services
from qat_server.provisioning.plan import PfPlan, plan
from qat_server.provisioning.progress import NOT_PUBLISHED, PfRecord, Progress, Stage
from qat_server.provisioning.steps import Step
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress

log = logs.get(__name__)

_POLL: Final = 0.5  # seconds between two checks whether the VFs that a PF waits for are still open
_LONGEST_PAUSE: Final = 15.0  # seconds between two PodResources queries


class Provisioner:
    """Carries out the configuration. `on_change` requests a rescan of a device, or with None only a reconcile.

    `withheld` are the VFs that must not be given to pods now, each with the reason. `drain`: while a PF waits, its
    free VFs are withheld too.
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
        self.withheld: dict[PciAddress, str] = {}
        self._configuration: Configuration | None = None
        self._records: dict[PciAddress, PfRecord] = {}
        self._backoff = Backoff()
        self._warned: set[tuple[PciAddress | None, str]] = set()
        self._polled: object = None  # what the waiting PFs waited for when they were last polled
        self._query_at, self._pause = 0.0, _POLL
        self._wake_up = WakeUp(lambda: on_change(None), clock)

    @property
    def progress(self) -> dict[PciAddress, Progress]:
        """The progress of each PF."""
        return {address: record.progress for address, record in self._records.items() if record.progress is not None}

    @property
    def working(self) -> tuple[PciAddress, ...]:
        """The PFs that are being changed."""
        return tuple(sorted(address for address, record in self._records.items() if record.running))

    def settled(self, pfs: Sequence[PhysicalFunction]) -> list[PhysicalFunction]:
        """The PFs that are not being changed; the state of the others is transient."""
        working = self.working
        return [pf for pf in pfs if pf.address not in working]

    def unfinished(self) -> list[str]:
        """A sentence for each PF that is not provisioned yet, and that may soon be."""
        return [
            f"PF {address} is not provisioned: {progress.reason or progress.stage}"
            for address, progress in sorted(self.progress.items())
            if progress.stage not in (Stage.DONE, Stage.WAITING) and self._records[address].may_soon_progress
        ]

    def may_be_bound(self, inventory: Inventory, vfs: Iterable[PciAddress]) -> list[PciAddress]:
        """These VFs without those that are about to be removed, or may be."""
        changing = {address for address, each in self._records.items() if each.removing_vfs or each.holders_pending}
        removed = {vf for pf in inventory.pfs if pf.address in changing for vf in pf.vfs}
        return [vf for vf in vfs if vf not in removed]

    async def reconcile(
        self,
        inventory: Inventory,
        configuration: Configuration | None,
        holders: Callable[[], Mapping[PciAddress, str] | None],
        work: asyncio.TaskGroup,
    ) -> None:
        """Compare each PF with its desired state, and start the steps that can be carried out in tasks of `work`."""
        if configuration is None:
            return
        if configuration != self._configuration:
            self._configuration = configuration
            self._backoff = Backoff()
            for record in self._records.values():
                record.failure, record.denied, record.refused = None, "", None
            self._warned.clear()
        states = await asyncio.to_thread(read_actual_states, self._sysfs_root, self.settled(inventory.pfs), False)
        planned = plan(inventory, states, configuration, holders(), self._refused())
        removing = [each.pf for each in planned.pfs if each.pending or each.removes_vfs]
        if removing:  # rare; otherwise it does not matter which VFs are open
            states.update(await asyncio.to_thread(read_actual_states, self._sysfs_root, removing))
            planned = plan(inventory, states, configuration, holders(), self._refused())
        self._update_records(planned.pfs)
        for note in planned.notes:
            self._warn_once(None, "provisioning configuration", note)
        for each in planned.pfs:
            record = self._records[each.pf.address]
            if record.running or each.pf.address not in states:
                continue
            if not self._usage.synced and each.pf.vfs and (each.steps or each.pending):
                record.holders_pending = True
                continue
            before, record.progress = record.progress, self._reconcile_pf(each, record, work)
            if before is not None and before.stage != Stage.DONE == record.progress.stage:
                log.info("PF provisioned", pf=each.pf.address, wanted=record.progress.wanted)
        self.withheld = self._withhold(planned.pfs)
        self._schedule([each for each in planned.pfs if each.holds and not self._records[each.pf.address].running])

    def helper_changed(self) -> None:
        """Retry all failures at once: another helper may have another policy."""
        self._backoff = Backoff()
        for record in self._records.values():
            record.denied = ""

    def published(self) -> None:
        """Take note that the kubelet was sent a list in which `withheld` is in effect."""
        unpublished = [record for record in self._records.values() if record.withheld_since == NOT_PUBLISHED]
        for record in unpublished:
            record.withheld_since = self._clock()
        if unpublished:
            self._usage.refresh()

    def _reconcile_pf(self, pf_plan: PfPlan, record: PfRecord, work: asyncio.TaskGroup) -> Progress:
        address, wanted, held_by = pf_plan.pf.address, str(pf_plan.desired), pf_plan.holders
        steps = tuple(map(str, (*pf_plan.steps, *pf_plan.pending)))
        for note in pf_plan.notes:
            self._warn_once(address, "PF is only partly provisioned", note)
        _log_wait(pf_plan, record)
        removes_vfs = bool(pf_plan.pf.vfs) and pf_plan.removes_vfs
        if not removes_vfs:
            record.withheld_since = None
        if pf_plan.impossible:
            self._warn_once(address, "PF cannot be provisioned", pf_plan.impossible)
            return Progress(Stage.IMPOSSIBLE, wanted, reason=pf_plan.impossible)
        if not steps:
            self._backoff = self._backoff.without(address)
            record.failure = None
            if pf_plan.refusal:
                return Progress(Stage.FAILED, wanted, reason=pf_plan.refusal)
            record.refused = None
            return Progress(Stage.DONE, wanted)
        if not pf_plan.steps:
            return Progress(Stage.WAITING, wanted, steps, held_by)
        if not self._helper.connected or record.denied:
            record.withheld_since = None
            return Progress(Stage.FAILED, wanted, steps, held_by, self._helper.error or record.denied)
        if not self._backoff.due(address, self._clock()):
            stage, failure = record.failure or (Stage.WORKING, "")
            return Progress(stage, wanted, steps, held_by, failure)
        if removes_vfs and not self._vfs_stay_free(record):
            return Progress(Stage.WORKING, wanted, steps)
        record.running = True
        # Counts as a failure until the PF is seen in its desired state, so a change without effect is not repeated
        # without a pause.
        self._backoff = self._backoff.failed(address, self._clock())
        work.create_task(self._execute(pf_plan, record))
        return Progress(Stage.WORKING, wanted, steps, held_by)

    def _vfs_stay_free(self, record: PfRecord) -> bool:
        """Whether VFs that the plan found free cannot have been given to a pod since."""
        if record.withheld_since is None:
            record.withheld_since = NOT_PUBLISHED
        return self._usage.answer_queried_at > record.withheld_since

    async def _execute(self, pf_plan: PfPlan, record: PfRecord) -> None:
        address = pf_plan.pf.address
        try:
            for step in pf_plan.steps:
                try:
                    done = await execute(self._helper, step)
                except HelperUnavailableError:
                    self._backoff = self._backoff.without(address)
                    return  # when the helper is back, a reconcile follows
                except HelperError as error:
                    self._failed(record, step, error)
                    return
                except Exception as error:  # a defect here must not end what is already served
                    log.exception("provisioning failed", pf=address, step=str(step))
                    record.failure = (Stage.FAILED, f"{step}: a defect of this server: {error!r}")
                    return
                log.info("PF changed", pf=address, step=str(step), before=done.before, now=done.now)
            record.failure = None
        finally:
            record.running, record.withheld_since = False, None
            for each in (address, *pf_plan.pf.vfs):
                self._on_change(each)

    def _failed(self, record: PfRecord, step: Step, error: HelperError) -> None:
        text = failure_text(step, error)
        if services := refused_services(step, error):
            record.refused = services
            self._backoff = self._backoff.without(step.address)
        if error.code == ErrorCode.DENIED:  # a retry would be denied too
            record.denied = text
        busy = error.code in (ErrorCode.BUSY, ErrorCode.TIMED_OUT)
        failure = (Stage.BUSY if busy else Stage.FAILED, text)
        if record.failure != failure:
            write = log.info if busy else log.error
            write("PF not changed", pf=step.address, code=error.code, why=text)
        record.failure = failure

    def _withhold(self, planned: Sequence[PfPlan]) -> dict[PciAddress, str]:
        withheld = {}
        for each in planned:
            address = each.pf.address
            if self._records[address].removing_vfs:
                withheld.update(dict.fromkeys(each.pf.vfs, f"PF {address} is being provisioned"))
            elif self._drain and each.holds:
                held = {hold.vf for hold in each.holds}
                reason = f"PF {address} is being drained: it is provisioned when its other VFs are free"
                withheld.update((vf, reason) for vf in each.pf.vfs if vf not in held)
        return withheld

    def _schedule(self, waiting: Sequence[PfPlan]) -> None:
        """Schedule a reconcile for what no event reports: the end of a backoff, or a VF that has become free."""
        now = self._clock()
        due = self._backoff.next_due(now)
        if waiting:
            due = min(due or now + _POLL, now + _POLL)
            polled = [(each.pf.address, each.holds, each.actual and each.actual.open_vfs) for each in waiting]
            if polled != self._polled:
                self._polled, self._query_at, self._pause = polled, now, _POLL
            # While a VF is open, the kernel shows first that it is free.
            if now >= self._query_at and any(each.actual and not each.actual.open_vfs for each in waiting):
                self._usage.refresh()
                # BEING_ADMITTED lasts a few seconds at most: then PodResources names the pod, or it is gone.
                admitting = any(BEING_ADMITTED in each.holders for each in waiting)
                self._pause = _POLL if admitting else min(self._pause * 2, _LONGEST_PAUSE)
                self._query_at = now + self._pause
        self._wake_up.at(due)

    def _warn_once(self, address: PciAddress | None, message: str, text: str) -> None:
        """Log a warning, unless it was logged since the configuration last changed."""
        if (address, text) not in self._warned:
            self._warned.add((address, text))
            log.warning(message, pf=address, why=text)

    def _refused(self) -> dict[PciAddress, tuple[str, ...]]:
        return {address: each.refused for address, each in self._records.items() if each.refused is not None}

    def _update_records(self, planned: Sequence[PfPlan]) -> None:
        """Add new PFs, and forget those that are gone and not being changed."""
        pfs = {each.pf.address: each.pf for each in planned}
        self._records = {a: record for a, record in self._records.items() if a in pfs or record.running}
        for address, pf in pfs.items():
            record = self._records.setdefault(address, PfRecord(pf))
            record.pf, record.holders_pending = pf, False
        self._backoff = self._backoff.keep(self._records)


def _log_wait(pf_plan: PfPlan, record: PfRecord) -> None:
    """Log a wait once; not while the holder is BEING_ADMITTED, since the pod's name follows in a moment."""
    if BEING_ADMITTED in pf_plan.holders:
        return
    steps = ", ".join(map(str, pf_plan.pending))
    if steps and steps != record.logged_wait:
        log.info("PF waits until its VFs are free", pf=pf_plan.pf.address, steps=steps, held_by=pf_plan.holders)
    record.logged_wait = steps
