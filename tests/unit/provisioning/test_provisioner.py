"""The order: VFs are withheld and published before PodResources is queried, and queried before the first step."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

from qat_server.devices.discovery import discover
from qat_server.helper_client.client import HelperClient, HelperError
from qat_server.kubelet.device import Holder
from qat_server.kubelet.pod_resources import Answer
from qat_server.kubelet.usage import BEING_ADMITTED, DeviceUsage
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.progress import Stage
from qat_server.provisioning.provisioner import Provisioner
from qat_server.provisioning.qat_conf import QatConf
from qat_shared.messages import AnyRequest, AuditHead, ErrorCode, Provisioned, SetServices
from qat_shared.pci import PciAddress
from support.conditions import until
from support.sysfs_tree import SysfsTree, address

PF, OTHER = address("6b:00.0"), address("70:00.0")
VFS = tuple(address(f"6b:00.{number}") for number in (1, 2))
CRYPTO = Configuration(QatConf(services=("asym", "sym")))


class Helper:
    """A stand-in for the client: records its requests, and fails or waits on demand."""

    def __init__(self) -> None:
        self.requests: list[AnyRequest] = []
        self.failure: HelperError | None = None
        self.connected = True
        self.error = "the helper has gone"
        self.proceed = asyncio.Event()
        self.proceed.set()

    async def provision(self, make: Callable[[int], AnyRequest]) -> Provisioned:
        self.requests.append(make(1))
        await self.proceed.wait()
        if self.failure is not None:
            raise self.failure
        return Provisioned(id=1, audit=AuditHead(sequence=0, hash=""), before="", now="")


class Bench:
    """A tree with one PF (services dc, desired sym;asym), and a kubelet that reports which pods hold its VFs."""

    def __init__(self, root: Path, work: asyncio.TaskGroup, drain: bool) -> None:
        self.tree = SysfsTree(root)
        self.tree.pf("6b:00.0", sriov_totalvfs="2")
        for vf in VFS:
            self.tree.vf(str(vf), "6b:00.0", "vfio-pci", group=vf.function)
        self.helper = Helper()
        self.time = 100.0
        self.pods: dict[PciAddress, str] = {}
        self.queries = 0
        self.changes: list[PciAddress | None] = []
        self.usage = DeviceUsage(self._query, lambda: None, 3600, clock=lambda: self.time)
        self.being_admitted: set[PciAddress] = set()
        self.configuration = CRYPTO
        self.work = work
        self.provisioner = Provisioner(
            cast(HelperClient, self.helper), root, self.usage, self.changes.append, drain, lambda: self.time
        )

    async def _query(self) -> Answer:
        self.queries += 1
        return Answer({"dc": {vf: Holder(pod) for vf, pod in self.pods.items()}}, pods=1)

    async def answered(self) -> None:
        """Query the kubelet, and wait for its answer."""
        before = self.queries
        self.time += 1
        self.usage.refresh()
        await until(lambda: self.queries > before and self.usage.answer_queried_at == self.time)

    async def reconcile(self) -> None:
        inventory = discover(self.tree.root, ("4xxxvf",), 64)
        await self.provisioner.reconcile(inventory, self.configuration, self._holders, self.work)
        await asyncio.sleep(0)

    def _holders(self) -> dict[PciAddress, str] | None:
        return dict.fromkeys(self.being_admitted, BEING_ADMITTED) | self.usage.holder_names()

    def stage(self) -> Stage:
        return self.provisioner.progress[PF].stage


@asynccontextmanager
async def bench(root: Path, drain: bool = False) -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as work:
        made = Bench(root, work, drain)
        running = asyncio.create_task(made.usage.run())
        try:
            await made.answered()
            yield made
        finally:
            made.helper.proceed.set()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_vfs_are_withheld_then_published_then_queried_then_removed(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        await it.reconcile()
        assert it.provisioner.withheld.keys() == set(VFS)
        await it.answered()
        await it.reconcile()
        assert it.helper.requests == [], "not published yet: any VF may have been allocated"
        it.provisioner.published()
        await it.reconcile()
        assert it.helper.requests == [], "the last answer was to an earlier query"
        await it.answered()
        await it.reconcile()
        await until(lambda: len(it.helper.requests) == 2)
        assert isinstance(it.helper.requests[0], SetServices)
        assert set(it.changes) >= {PF, *VFS}


async def test_a_pod_that_was_admitted_before_publishing_is_waited_for(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        await it.reconcile()
        it.being_admitted.add(VFS[1])  # allocated before it was published
        it.provisioner.published()
        await it.answered()
        await it.reconcile()
        assert it.stage() is Stage.WAITING
        assert it.provisioner.withheld == {}, "its free VFs may be allocated again"
        it.being_admitted.clear()
        it.pods = {VFS[1]: "default/pod/main"}
        await it.answered()
        await it.reconcile()
        assert it.provisioner.progress[PF].held_by == ("default/pod/main",)
        it.pods = {}
        await it.answered()
        await it.reconcile()
        assert it.helper.requests == [], "must be withheld, published and queried again"
        it.provisioner.published()
        await it.answered()
        await it.reconcile()
        await until(lambda: it.helper.requests)


async def test_drain_withholds_only_free_vfs(tmp_path: Path) -> None:
    async with bench(tmp_path, drain=True) as it:
        it.pods = {VFS[0]: "default/pod/main"}
        await it.answered()
        await it.reconcile()
        assert it.provisioner.withheld.keys() == {VFS[1]}
        it.provisioner.published()
        it.pods = {}
        await it.answered()
        await it.reconcile()
        assert it.provisioner.withheld.keys() == set(VFS)
        await it.answered()
        await it.reconcile()
        assert it.helper.requests == [], "the VF that has just become free was not withheld during the query"


async def test_without_podresources_a_pf_with_vfs_waits(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        inventory = discover(it.tree.root, ("4xxxvf",), 64)
        await it.provisioner.reconcile(inventory, CRYPTO, lambda: None, it.work)
        assert it.provisioner.progress[PF].held_by == ("not known",)
        it.tree.pf("70:00.0", sriov_totalvfs="2")
        inventory = discover(it.tree.root, ("4xxxvf",), 64)
        await it.provisioner.reconcile(inventory, CRYPTO, lambda: None, it.work)
        await until(lambda: [request.address for request in it.helper.requests[:1]] == [OTHER])  # type: ignore[union-attr]


async def test_vfs_are_not_bound_while_their_pf_is_being_changed(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        inventory = discover(it.tree.root, ("4xxxvf",), 64)
        assert it.provisioner.may_be_bound(inventory, VFS) == list(VFS)
        await it.reconcile()
        assert it.provisioner.may_be_bound(inventory, VFS) == []
        it.provisioner.published()
        await it.answered()
        it.helper.proceed.clear()
        await it.reconcile()
        assert it.provisioner.working == (PF,)
        assert it.provisioner.may_be_bound(inventory, VFS) == []
        assert it.provisioner.settled(inventory.pfs) == []
        await it.reconcile()
        assert len(it.helper.requests) == 1, "one at a time"


async def test_failures_and_changes_without_effect_are_retried_with_backoff(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        for vf in VFS:
            it.tree.remove(str(vf))
        for number in range(len(VFS)):
            (it.tree.path("6b:00.0") / f"virtfn{number}").unlink()
        it.helper.failure = HelperError(ErrorCode.KERNEL, "no")
        await it.reconcile()
        await until(lambda: not it.provisioner.working)
        await it.reconcile()
        assert (it.stage(), len(it.helper.requests)) == (Stage.FAILED, 1)
        it.time += 0.6
        it.helper.failure = HelperError(ErrorCode.BUSY, "an earlier one")
        await it.reconcile()
        await until(lambda: not it.provisioner.working)
        await it.reconcile()
        assert (it.stage(), len(it.helper.requests)) == (Stage.BUSY, 2)
        it.time += 1.1
        it.helper.failure = None
        await it.reconcile()
        await until(lambda: not it.provisioner.working)
        assert len(it.helper.requests) == 4
        await it.reconcile()  # the tree has not changed
        assert (it.stage(), len(it.helper.requests)) == (Stage.WORKING, 4)
        it.helper.connected = False
        it.time += 60
        await it.reconcile()
        assert it.provisioner.progress[PF].reason == "the helper has gone"
        it.configuration = Configuration(QatConf(services=("dc",)))
        it.tree.write("6b:00.0", "qat/cfg_services", "dc\n")
        for vf in VFS:
            it.tree.vf(str(vf), "6b:00.0", "vfio-pci", group=vf.function)
        await it.reconcile()
        assert it.stage() is Stage.DONE


async def test_services_that_a_killed_helper_has_set_after_all_count_as_set(tmp_path: Path) -> None:
    """Its child went on: the next attempt is refused (EINVAL), since the device is up again, with these services."""
    async with bench(tmp_path) as it:
        for number, vf in enumerate(VFS):
            it.tree.remove(str(vf))
            (it.tree.path("6b:00.0") / f"virtfn{number}").unlink()
        it.helper.failure = HelperError(ErrorCode.KERNEL, "refused", errno.EINVAL)
        await it.reconcile()
        await until(lambda: not it.provisioner.working)
        it.helper.failure = None
        await it.reconcile()
        await until(lambda: not it.provisioner.working)
        assert len(it.helper.requests) == 2, "its VFs are enabled in any case"
        it.tree.write("6b:00.0", "qat/cfg_services", "sym;asym\n")
        for vf in VFS:
            it.tree.vf(str(vf), "6b:00.0", "vfio-pci", group=vf.function)
        await it.reconcile()
        assert (it.stage(), it.provisioner.progress[PF].reason) == (Stage.DONE, "")
