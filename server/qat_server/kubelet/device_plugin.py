"""The DevicePlugin service of one resource, answered from the last list alone: no file, no other process is asked.

`update` replaces the list (one immutable snapshot with all that answers need); the RPCs only look things up in it. The
kubelet waits for Allocate without a time-out and forgets the devices of an empty answer, so each request gets either
a full answer or an error with a sentence that ends up in the pod's status.
"""

# ruff: noqa: N802 - the RPCs' names are the protocol's

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, NoReturn, Protocol, TypeAlias

import grpc
import grpc.aio

from qat_server import logs
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet import allocation
from qat_server.kubelet.allocation import AllocationError, AllocationIndex, AllocationPolicy
from qat_server.kubelet.device import Device
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2_grpc as rpc
from qat_server.kubelet.watch_streams import WatchStreams
from qat_shared.pci import PciAddress

log = logs.get(__name__)

HEALTHY: Final = "Healthy"
UNHEALTHY: Final = "Unhealthy"
OPTIONS: Final = pb.DevicePluginOptions(pre_start_required=False, get_preferred_allocation_available=True)

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"


class RefusedError(Exception):
    """A request that is answered with an error: the code and one sentence."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def outcome(self) -> str:
        """As counted: invalid-argument, failed-precondition."""
        return self.code.name.lower().replace("_", "-")


class _Entry:
    """One device with its part of an answer, made once for each snapshot."""

    __slots__ = ("device", "listed", "mounts", "specs")

    def __init__(self, device: Device) -> None:
        self.device = device
        self.listed = _listed(device)
        self.specs = tuple(
            (node, pb.DeviceSpec(container_path=node, host_path=node, permissions="rw")) for node in device.nodes
        )
        self.mounts = tuple((path, pb.Mount(container_path=path, host_path=path)) for path in device.mounts)


class Snapshot:
    """A list of devices and what is looked up in it. Immutable."""

    __slots__ = ("entries", "healthy", "index", "message")

    def __init__(self, devices: Iterable[Device], before: "Snapshot | None" = None) -> None:
        known = {} if before is None else before.entries
        self.entries: dict[str, _Entry] = {}
        for device in devices:
            name = str(device.address)
            entry = known.get(name)
            self.entries[name] = entry if entry is not None and entry.device == device else _Entry(device)
        listed = [entry.device for entry in self.entries.values()]
        self.healthy = frozenset(each for each, entry in self.entries.items() if entry.device.healthy)
        self.index = AllocationIndex(listed)
        message = pb.ListAndWatchResponse(devices=[entry.listed for entry in self.entries.values()])
        # What the kubelet may know of has not changed: the very same message tells the streams so.
        self.message: pb.ListAndWatchResponse = (
            before.message if before is not None and before.message == message else message
        )


def _listed(device: Device) -> pb.Device:
    health = HEALTHY if device.healthy else UNHEALTHY
    if device.numa_node is None:
        return pb.Device(ID=str(device.address), health=health)
    topology = pb.TopologyInfo(nodes=[pb.NUMANode(ID=device.numa_node)])
    return pb.Device(ID=str(device.address), health=health, topology=topology)


class AllocationObserver(Protocol):
    """Follows what the kubelet does with the devices, and knows which of them pods hold."""

    def allocated(self) -> None:
        """Devices were handed out just now."""

    def watched(self, again: bool) -> None:
        """The kubelet has opened a ListAndWatch stream; `again`: another stream has ended before."""

    def in_use(self, resource: str, handed_out: Mapping[PciAddress, float]) -> Collection[PciAddress] | None:
        """The devices of a resource that pods hold, or may hold; None where that is not known."""


class DevicePlugin(rpc.DevicePluginServicer):
    """Serves one resource, named without its namespace.

    `handed_out` maps each device to the time, by `clock`, at which it was last given to a container.
    """

    def __init__(
        self,
        name: str,
        policy: AllocationPolicy,
        counters: Counters,
        usage: AllocationObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._usage = usage
        self._policy = policy
        self._counters = counters
        self._clock = clock
        self._snapshot = Snapshot(())
        self._ever: set[str] = set()
        self._withdrawn = False
        self._wake: set[asyncio.Event] = set()
        self.handed_out: dict[PciAddress, float] = {}
        self.streams = WatchStreams(usage.watched)

    def update(self, devices: Sequence[Device]) -> None:
        """Replace the list; the kubelet is told when what it may know of differs."""
        before = self._snapshot
        self._snapshot = Snapshot(devices, before)
        self._ever.update(self._snapshot.entries)
        if self._snapshot.message is not before.message:
            self._wake_streams()

    @property
    def count(self) -> int:
        """How many devices are listed now."""
        return len(self._snapshot.entries)

    def withdraw(self) -> None:
        """End all streams and refuse every further request."""
        self._withdrawn = True
        self._wake_streams()

    def _wake_streams(self) -> None:
        for event in self._wake:
            event.set()

    async def GetDevicePluginOptions(self, request: pb.Empty, context: Context) -> pb.DevicePluginOptions:
        """The kubelet asks this inside Register, and waits."""
        return OPTIONS

    # A coroutine that writes, where the stub foresees a generator: grpc.aio takes both, and only this one's `finally`
    # is sure to run at once when the kubelet goes away.
    async def ListAndWatch(self, request: pb.Empty, context: Context) -> None:  # type: ignore[override]
        """The list now and whenever it has changed. A slow reader gets the newest, not each one between."""
        wake = asyncio.Event()
        self._wake.add(wake)
        self.streams.open()
        sent: pb.ListAndWatchResponse | None = None
        try:
            while not self._withdrawn:
                if self._snapshot.message is sent:
                    wake.clear()
                    await wake.wait()
                else:
                    sent = self._snapshot.message
                    await context.write(sent)
        finally:
            self._wake.discard(wake)
            self.streams.end()

    async def GetPreferredAllocation(
        self, request: pb.PreferredAllocationRequest, context: Context
    ) -> pb.PreferredAllocationResponse:
        """What the policy would choose."""
        answer = pb.PreferredAllocationResponse()
        try:
            for each in request.container_requests:
                answer.container_responses.add(deviceIDs=self._prefer(each))
                self._counters.preferred_allocation(self._name)
        except RefusedError as refused:
            self._counters.preferred_allocation(self._name, refused.outcome)
            await self._refuse("preferred allocation refused", refused, context)
        return answer

    async def Allocate(self, request: pb.AllocateRequest, context: Context) -> pb.AllocateResponse:
        """Device files, mounts and environment for each container by itself."""
        answer = pb.AllocateResponse()
        try:
            chosen = [self._allocatable(each.devices_ids) for each in request.container_requests]
            if not chosen:
                raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "the request names no container")
        except RefusedError as refused:
            self._counters.allocation(self._name, 0, refused.outcome)
            await self._refuse("allocation refused", refused, context)
        now = self._clock()
        for entries in chosen:
            self._fill(answer.container_responses.add(), entries)
            for entry in entries:
                self.handed_out[entry.device.address] = now
            self._counters.allocation(self._name, len(entries))
        # Telling others can wait until the answer is on its way.
        asyncio.get_running_loop().call_soon(self._tell, chosen)
        return answer

    def _tell(self, chosen: Sequence[Sequence[_Entry]]) -> None:
        for entries in chosen:
            log.info("devices allocated", resource=self._name, devices=[entry.device.address for entry in entries])
        self._usage.allocated()

    async def PreStartContainer(
        self, request: pb.PreStartContainerRequest, context: Context
    ) -> pb.PreStartContainerResponse:
        """Nothing is to be done; the options say so, and the kubelet does not ask."""
        return pb.PreStartContainerResponse()

    async def _refuse(self, message: str, refused: RefusedError, context: Context) -> NoReturn:
        log.warning(message, resource=self._name, why=str(refused))
        await context.abort(refused.code, str(refused))
        raise AssertionError("abort raises")

    def _fill(self, answer: pb.ContainerAllocateResponse, entries: Sequence[_Entry]) -> None:
        # /dev/vfio/vfio is a node of every vfio device, and two VFs may share a group.
        answer.devices.extend(dict(spec for entry in entries for spec in entry.specs).values())
        mounts = dict(mount for entry in entries for mount in entry.mounts)
        if mounts:
            answer.mounts.extend(mounts.values())
        answer.envs.update(allocation.environment([entry.device.address for entry in entries]))

    def _allocatable(self, ids: Sequence[str]) -> list[_Entry]:
        """The devices that one container is to get, in address order. Raises RefusedError."""
        known = self._snapshot.entries
        entries = []
        for each in ids:
            entry = known.get(each)
            if entry is None:
                raise self._missing(each)
            if self._withdrawn or entry.device.reason:
                why = entry.device.reason or "its resource is being withdrawn"
                raise RefusedError(
                    grpc.StatusCode.FAILED_PRECONDITION, f"QAT device {each} cannot be given to a container: {why}"
                )
            entries.append(entry)
        if not entries:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "the request names no device for a container")
        if len(set(ids)) != len(entries):
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"the request names a device twice: {', '.join(ids)}")
        entries.sort(key=lambda entry: entry.device.address)
        return entries

    def _prefer(self, request: pb.ContainerPreferredAllocationRequest) -> list[str]:
        """The ids for one container. Raises RefusedError."""
        snapshot = self._snapshot
        offered = list(request.available_deviceIDs)
        must = list(request.must_include_deviceIDs)
        for each in must:
            if each not in snapshot.entries:
                raise self._missing(each)
        # The kubelet's list may be a moment old: what has gone or is unhealthy meanwhile is not preferred.
        eligible = snapshot.healthy.union(must) if must else snapshot.healthy
        available = [each for each in offered if each in eligible]
        try:
            held = self._usage.in_use(self._name, self.handed_out)
            return snapshot.index.preferred(self._policy, available, must, request.allocation_size, held)
        except AllocationError as error:
            lost = len(offered) - len(available)
            also = f" ({lost} of those offered are not healthy or not listed any more)" if lost else ""
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"{error}{also}") from error

    def _missing(self, device_id: str) -> RefusedError:
        shown = device_id[:40]
        if device_id in self._ever:
            return RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION, f"QAT device {shown} has gone and is not listed any more"
            )
        return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"{shown!r} is no device of qat.intel.com/{self._name}")
