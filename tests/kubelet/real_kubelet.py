"""The real kubelet's device manager, for tests: what one can do with it, and see of it.

    from kubelet.real_kubelet import RealKubelet       # tests/ is on pytest's path

    async with RealKubelet(Path("/tmp/qat-x/kubelet")) as kubelet:
        await kubelet.wait_for(allocatable={"qat.intel.com/cy": 4})
        allocation = await kubelet.allocate("pod-a", [("main", "qat.intel.com/cy", 2)])

Several things can be asked at the same time. Its process is that of harness_process.py.
"""

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Self

import msgspec

from kubelet.answers import (
    AdmissionError,
    Allocation,
    Check,
    ContainerAllocation,
    Device,
    KubeletError,
    PodDevices,
    Quantities,
    RefusedPod,
    TopologyAffinityError,
    Waited,
)
from kubelet.harness_process import HARNESS, Harness
from qat_simulation.kubelet.topology import TopologyPolicy

CHECKPOINT: Final = "kubelet_internal_checkpoint"

Damage = Literal["garbage", "checksum", "empty", "removed"]


class _Devices(msgspec.Struct):
    devices: dict[str, tuple[Device, ...]]


class _Allocated(msgspec.Struct):
    pod: str
    containers: tuple[ContainerAllocation, ...]


class _Pods(msgspec.Struct):
    pods: tuple[PodDevices, ...]


class _Status(msgspec.Struct):
    containers: dict[str, dict[str, dict[str, str]]]


class Claim(msgspec.Struct, frozen=True):
    """A plugin of another type than DevicePlugin that the plugin manager has passed to that type's handler."""

    type: str
    name: str
    endpoint: str


class _Watcher(msgspec.Struct):
    settled: bool
    claimed: tuple[Claim, ...]


class _Started(msgspec.Struct):
    refused: tuple[RefusedPod, ...]


class _Nothing(msgspec.Struct):
    pass


class RealKubelet:
    """One kubelet on `directory` (its --kubelet-dir), with `numa` NUMA nodes. Pods outlive its restarts and crashes."""

    def __init__(
        self,
        directory: Path,
        policy: TopologyPolicy = TopologyPolicy.BEST_EFFORT,
        numa: int = 2,
        harness: Path = HARNESS,
        verbosity: int = 4,
    ) -> None:
        self.directory = directory
        self._harness = Harness(directory, harness, (f"--policy={policy}", f"--numa={numa}", f"-v={verbosity}"))

    @property
    def plugin_directory(self) -> Path:
        return self.directory / "device-plugins"

    @property
    def registry_directory(self) -> Path:
        return self.directory / "plugins_registry"

    @property
    def registration_socket(self) -> Path:
        return self.plugin_directory / "kubelet.sock"

    @property
    def pod_resources_socket(self) -> Path:
        return self.directory / "pod-resources" / "kubelet.sock"

    @property
    def alive(self) -> bool:
        """Whether the process runs: a kubelet that crashed is not alive, one that was stopped is."""
        return self._harness.alive

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        await self.close()

    async def start(self, *, reboot: bool = False) -> tuple[RefusedPod, ...]:
        """Start the stopped, killed or never started kubelet. Pods from before are admitted again: those refused are
        returned, and gone. With `reboot` their containers do not run, as after a reboot of the node."""
        await self._harness.launch()
        return (await self._harness.ask("start", _Started, reboot=reboot)).refused

    async def stop(self, kill: bool = False) -> None:
        """Stop the kubelet in order: streams end, its sockets are removed. With `kill` its process gets a SIGKILL and
        the sockets stay behind (as always in production: the kubelet just exits). `start` starts it again."""
        if kill:
            await self._harness.kill()
        else:
            await self._harness.ask("stop", _Nothing)

    async def restart(self, kill: bool = False, *, reboot: bool = False) -> tuple[RefusedPod, ...]:
        """`stop` and `start`: milliseconds."""
        await self.stop(kill)
        return await self.start(reboot=reboot)

    async def close(self) -> None:
        """End the process, in order if it lets itself be ended. Raises nothing: a test has said what it had to say."""
        await self._harness.close()

    def damage_checkpoint(self, damage: Damage = "garbage") -> None:
        """Damage the file in which the kubelet keeps who has which device. The kubelet must be stopped or killed."""
        damage_checkpoint(self.plugin_directory, damage)

    async def capacity(self) -> dict[str, int]:
        """The node's capacity: healthy and unhealthy devices of each resource."""
        return (await self.quantities()).capacity

    async def allocatable(self) -> dict[str, int]:
        """The node's allocatable: healthy devices of each resource, allocated or not."""
        return (await self.quantities()).allocatable

    async def allocatable_free(self) -> dict[str, int]:
        """Of each resource, the healthy devices that no pod has."""
        return {
            name: sum(device.allocatable and device.holder is None for device in devices)
            for name, devices in (await self.devices()).items()
        }

    async def quantities(self) -> Quantities:
        """Capacity and allocatable at one moment."""
        return await self._harness.ask("capacity", Quantities)

    async def wait_for(
        self,
        *,
        capacity: Mapping[str, int | None] | None = None,
        allocatable: Mapping[str, int | None] | None = None,
        seconds: float = 20,
    ) -> Waited:
        """Wait until these resources are so (None: unknown), whatever others are. Raises TimeoutError."""
        try:
            return await self._harness.ask(
                "wait",
                Waited,
                capacity=dict(capacity or {}),
                allocatable=dict(allocatable or {}),
                timeout_ms=round(seconds * 1000),
            )
        except KubeletError as error:
            if error.kind != "timeout":
                raise
            raise TimeoutError(
                f"wanted capacity {dict(capacity or {})} and allocatable {dict(allocatable or {})}; {error}"
            ) from None

    async def devices(self) -> dict[str, tuple[Device, ...]]:
        """Every device that plugins have listed, by resource."""
        return (await self._harness.ask("devices", _Devices)).devices

    async def check(self) -> Check:
        """Compare the kubelet's books with each other; see `Check`. Waits for an admission under way."""
        return await self._harness.ask("check", Check)

    async def settled(self) -> bool:
        """Whether the plugin watcher has registered all that it has found, and will change nothing by itself."""
        return (await self._harness.ask("watcher", _Watcher)).settled

    async def claimed(self) -> tuple[Claim, ...]:
        """What the plugin watcher has found that claims to be a plugin of another type, and was believed."""
        return (await self._harness.ask("watcher", _Watcher)).claimed

    @property
    def pid(self) -> int:
        """The pid of its process, which must run."""
        assert self._harness.process is not None
        return self._harness.process.pid

    async def healthy(self) -> bool:
        """The device manager's part of /healthz."""
        try:
            await self._harness.ask("health", _Nothing)
        except KubeletError as error:
            if error.kind != "unhealthy":
                raise
            return False
        return True

    async def allocate(self, pod: str, requests: Sequence[tuple[str, str, int]]) -> Allocation:
        """Create a pod that asks for `requests` (container, resource, number), admit it and start its containers.

        A pod that is there already, and asked for the same, is admitted anew and keeps its devices.
        Raises AdmissionError when the kubelet refuses it: the pod is then gone. KubeletError of kind "container" when a
        container of the admitted pod cannot be started: the pod then stays.
        """
        containers: dict[str, dict[str, int]] = {}
        for container, resource, number in requests:
            containers.setdefault(container, {})[resource] = number
        try:
            allocated = await self._harness.ask(
                "allocate",
                _Allocated,
                pod=pod,
                containers=[{"name": name, "resources": resources} for name, resources in containers.items()],
            )
        except KubeletError as error:
            if error.kind != "admission":
                raise
            kind = TopologyAffinityError if error.reason == "TopologyAffinityError" else AdmissionError
            raise kind(pod, error.reason, error.message) from None
        return Allocation({container.name: container for container in allocated.containers}, pod)

    async def restart_container(self, pod: str, container: str) -> ContainerAllocation:
        """Start a container of an admitted pod again, as after its crash: no admission, and no other devices."""
        return await self._harness.ask("prestart", ContainerAllocation, pod=pod, container=container)

    async def free(self, pod: str) -> None:
        """Delete a pod. Raises KubeletError of kind "not-found"."""
        await self._harness.ask("free", _Nothing, pod=pod)

    async def pods(self) -> tuple[PodDevices, ...]:
        """The pods that there are, in the order of their creation."""
        return (await self._harness.ask("pods", _Pods)).pods

    async def devices_of(self, pod: str) -> set[str]:
        """The ids of a pod's devices; empty when there is no such pod."""
        return next((entry.devices for entry in await self.pods() if entry.pod == pod), set())

    async def status(self, pod: str) -> dict[str, dict[str, dict[str, str]]]:
        """A pod's allocatedResourcesStatus: "Healthy" or "Unhealthy" by container, resource and device id."""
        return (await self._harness.ask("status", _Status, pod=pod)).containers

    async def age(self, resource: str, seconds: int = 301) -> None:
        """Let time pass for a resource whose endpoint has stopped: it is forgotten after 300 s."""
        await self._harness.ask("age", _Nothing, resource=resource, seconds=seconds)

    def log_tail(self, lines: int = 60) -> str:
        """The last lines of the kubelet's log, which after a crash end with its trace."""
        return self._harness.log_tail(lines)


def damage_checkpoint(plugin_directory: Path, damage: Damage) -> None:
    """Damage the checkpoint of a kubelet that does not run."""
    path = plugin_directory / CHECKPOINT
    match damage:
        case "garbage":
            path.write_bytes(b"\x00garbage{")
        case "checksum":
            content = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
            path.write_bytes(msgspec.json.encode({**content, "Checksum": 1}))
        case "empty":
            path.write_bytes(b"")
        case "removed":
            path.unlink()
