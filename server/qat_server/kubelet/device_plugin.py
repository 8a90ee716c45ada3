"""The DevicePlugin service of one resource, answered from the last list of devices: RPCs do no I/O.

`update` replaces the list, as one immutable snapshot, and RPCs only look things up in it. The kubelet waits for
Allocate without a timeout and forgets the devices of an empty answer. So each request gets either a complete answer or
an error, whose sentence appears in the pod's status.
"""

# ruff: noqa: N802 - the RPCs' names are the protocol's

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, NoReturn, Protocol, TypeAlias

import grpc
import grpc.aio

from qat_server import logs
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet import allocation
from qat_server.kubelet.allocation import AllocationError, AllocationPolicy
from qat_server.kubelet.device import Device
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2_grpc as rpc
from qat_server.kubelet.snapshot import ListedDevice, Snapshot
from qat_server.kubelet.watch_streams import WatchStreams
from qat_shared.pci import PciAddress

log = logs.get(__name__)

OPTIONS: Final = pb.DevicePluginOptions(pre_start_required=False, get_preferred_allocation_available=True)

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"


class RefusedError(Exception):
    """A request is refused: the gRPC code, and one sentence as the message."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def outcome(self) -> str:
        """The code as a metric label: invalid-argument, failed-precondition."""
        return self.code.name.lower().replace("_", "-")


class PodUsage(Protocol):
    """Observes allocations and streams, and knows which devices pods hold."""

    def allocated(self) -> None:
        """Devices were allocated just now."""

    def stream_opened(self, reconnected: bool) -> None:
        """The kubelet has opened a ListAndWatch stream. `reconnected`: another stream has ended before."""

    def possibly_held(self, resource: str, allocated_at: Mapping[PciAddress, float]) -> Collection[PciAddress] | None:
        """The devices of a resource that pods hold or may hold; None if that is unknown."""


class DevicePlugin(rpc.DevicePluginServicer):
    """Serves one resource, named without its namespace.

    `allocated_at` maps each device to the time, by `clock`, at which it was last allocated to a container.
    """

    def __init__(
        self,
        name: str,
        policy: AllocationPolicy,
        counters: Counters,
        usage: PodUsage,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._usage = usage
        self._policy = policy
        self._counters = counters
        self._clock = clock
        self._snapshot = Snapshot(())
        self._ever_listed: set[str] = set()
        self._withdrawn = False
        self._wake_events: set[asyncio.Event] = set()
        self.allocated_at: dict[PciAddress, float] = {}
        self.streams = WatchStreams(usage.stream_opened)

    def update(self, devices: Sequence[Device]) -> None:
        """Replace the list, and send it to the kubelet if anything that the kubelet sees has changed."""
        previous = self._snapshot
        self._snapshot = Snapshot(devices, previous)
        self._ever_listed.update(self._snapshot.devices)
        if self._snapshot.message is not previous.message:
            self._wake_streams()

    @property
    def count(self) -> int:
        """The number of devices listed now."""
        return len(self._snapshot.devices)

    def withdraw(self) -> None:
        """End all streams and refuse all further allocations."""
        self._withdrawn = True
        self._wake_streams()

    def _wake_streams(self) -> None:
        for event in self._wake_events:
            event.set()

    async def GetDevicePluginOptions(self, request: pb.Empty, context: Context) -> pb.DevicePluginOptions:
        """The options. The kubelet calls this within Register, and waits for it."""
        return OPTIONS

    # A coroutine that writes instead of the stub's generator. grpc.aio accepts both, but only the coroutine's `finally`
    # is certain to run at once when the kubelet disconnects.
    async def ListAndWatch(self, request: pb.Empty, context: Context) -> None:  # type: ignore[override]
        """Send the list now and after each change. A slow reader gets the newest list, not every one in between."""
        wake = asyncio.Event()
        self._wake_events.add(wake)
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
            self._wake_events.discard(wake)
            self.streams.end()

    async def GetPreferredAllocation(
        self, request: pb.PreferredAllocationRequest, context: Context
    ) -> pb.PreferredAllocationResponse:
        """The devices that the policy chooses, for each container."""
        answer = pb.PreferredAllocationResponse()
        try:
            for each in request.container_requests:
                answer.container_responses.add(deviceIDs=self._preferred(each))
                self._counters.preferred_allocation(self._name)
        except RefusedError as refused:
            self._counters.preferred_allocation(self._name, refused.outcome)
            await self._refuse("preferred allocation refused", refused, context)
        return answer

    async def Allocate(self, request: pb.AllocateRequest, context: Context) -> pb.AllocateResponse:
        """Device files, mounts and environment, for each container separately."""
        answer = pb.AllocateResponse()
        try:
            chosen = [self._allocatable(each.devices_ids) for each in request.container_requests]
            if not chosen:
                raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "the request names no container")
        except RefusedError as refused:
            self._counters.allocation(self._name, 0, refused.outcome)
            await self._refuse("allocation refused", refused, context)
        now = self._clock()
        for devices in chosen:
            self._fill(answer.container_responses.add(), devices)
            for listed in devices:
                self.allocated_at[listed.device.address] = now
            self._counters.allocation(self._name, len(devices))
        # The log line and the observer can wait until the answer is on its way.
        asyncio.get_running_loop().call_soon(self._report, chosen)
        return answer

    def _report(self, chosen: Sequence[Sequence[ListedDevice]]) -> None:
        for devices in chosen:
            log.info("devices allocated", resource=self._name, devices=[listed.device.address for listed in devices])
        self._usage.allocated()

    async def PreStartContainer(
        self, request: pb.PreStartContainerRequest, context: Context
    ) -> pb.PreStartContainerResponse:
        """Do nothing. The kubelet does not call this, since the options do not require it."""
        return pb.PreStartContainerResponse()

    async def _refuse(self, message: str, refused: RefusedError, context: Context) -> NoReturn:
        log.warning(message, resource=self._name, why=str(refused))
        await context.abort(refused.code, str(refused))
        raise AssertionError("abort raises")

    def _fill(self, answer: pb.ContainerAllocateResponse, devices: Sequence[ListedDevice]) -> None:
        # Each path once: /dev/vfio/vfio is a node of every vfio device, and two VFs may share a group.
        answer.devices.extend(dict(spec for listed in devices for spec in listed.specs).values())
        mounts = dict(mount for listed in devices for mount in listed.mounts)
        if mounts:
            answer.mounts.extend(mounts.values())
        answer.envs.update(allocation.environment([listed.device.address for listed in devices]))

    def _allocatable(self, ids: Sequence[str]) -> list[ListedDevice]:
        """The devices to allocate to one container, in address order. Raises RefusedError."""
        known = self._snapshot.devices
        devices = []
        for device_id in ids:
            listed = known.get(device_id)
            if listed is None:
                raise self._not_listed(device_id)
            if self._withdrawn or listed.device.reason:
                why = listed.device.reason or "its resource is being withdrawn"
                raise RefusedError(
                    grpc.StatusCode.FAILED_PRECONDITION, f"QAT device {device_id} cannot be allocated: {why}"
                )
            devices.append(listed)
        if not devices:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "the request names no device for a container")
        if len(set(ids)) != len(devices):
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"the request names a device twice: {', '.join(ids)}")
        devices.sort(key=lambda listed: listed.device.address)
        return devices

    def _preferred(self, request: pb.ContainerPreferredAllocationRequest) -> list[str]:
        """The IDs for one container. Raises RefusedError."""
        snapshot = self._snapshot
        offered = list(request.available_deviceIDs)
        must = list(request.must_include_deviceIDs)
        for device_id in must:
            if device_id not in snapshot.devices:
                raise self._not_listed(device_id)
        # The kubelet's list may be a moment old: devices that are unhealthy or unlisted by now are not preferred.
        eligible = snapshot.healthy.union(must) if must else snapshot.healthy
        available = [device_id for device_id in offered if device_id in eligible]
        try:
            held = self._usage.possibly_held(self._name, self.allocated_at)
            return snapshot.index.preferred(self._policy, available, must, request.allocation_size, held)
        except AllocationError as error:
            lost = len(offered) - len(available)
            note = f" ({lost} of the offered devices are unhealthy or no longer listed)" if lost else ""
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"{error}{note}") from error

    def _not_listed(self, device_id: str) -> RefusedError:
        shown = device_id[:40]
        if device_id in self._ever_listed:
            return RefusedError(grpc.StatusCode.FAILED_PRECONDITION, f"QAT device {shown} is no longer listed")
        return RefusedError(
            grpc.StatusCode.INVALID_ARGUMENT, f"{shown!r} is not a device of qat.intel.com/{self._name}"
        )
