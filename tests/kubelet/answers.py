"""What the real kubelet answers, and its errors: the types of `real_kubelet`, one for each result in commands.go."""

import msgspec

from qat_simulation.kubelet import kubelet as emulated
from qat_simulation.kubelet.pods import AdmittedPod


class Mount(msgspec.Struct, frozen=True):
    host_path: str
    container_path: str
    read_only: bool


class DeviceNode(msgspec.Struct, frozen=True):
    host_path: str
    container_path: str
    permissions: str


class ContainerAllocation(msgspec.Struct, frozen=True):
    """What one container is started with. The properties are those of the emulated kubelet's type of this name."""

    name: str
    by_resource: dict[str, tuple[str, ...]] = msgspec.field(name="devices")
    envs: dict[str, str]
    mounted: tuple[Mount, ...] = msgspec.field(name="mounts")
    nodes: tuple[DeviceNode, ...] = msgspec.field(name="device_nodes")
    annotations: dict[str, str]
    cdi_devices: tuple[str, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """The ids of all resources."""
        return tuple(id_ for ids in self.by_resource.values() for id_ in ids)

    @property
    def device_nodes(self) -> tuple[str, ...]:
        """Paths on the host."""
        return tuple(node.host_path for node in self.nodes)

    @property
    def mounts(self) -> tuple[str, ...]:
        """Paths on the host."""
        return tuple(mount.host_path for mount in self.mounted)


class Allocation(AdmittedPod[ContainerAllocation], frozen=True):
    """An admitted pod."""

    pod: str


class Holder(msgspec.Struct, frozen=True):
    pod: str
    container: str


class Device(msgspec.Struct, frozen=True):
    """A listed device: `health` is the plugin's word, `allocatable` the kubelet's (false when the endpoint is gone)."""

    id: str
    health: str
    numa_nodes: tuple[int, ...]
    allocatable: bool
    holder: Holder | None


class PodDevices(msgspec.Struct, frozen=True):
    """A pod that the kubelet knows: device ids by container and resource."""

    pod: str
    running: bool
    containers: dict[str, dict[str, tuple[str, ...]]]

    @property
    def devices(self) -> set[str]:
        """The ids of all the pod's devices."""
        return {id_ for resources in self.containers.values() for ids in resources.values() for id_ in ids}


class Quantities(msgspec.Struct, frozen=True):
    """The node's status; `deleted` are the resources forgotten by this very question."""

    capacity: dict[str, int]
    allocatable: dict[str, int]
    deleted: tuple[str, ...]


class Waited(Quantities, frozen=True):
    waited_ms: float


class ResourceBooks(msgspec.Struct, frozen=True):
    """What the kubelet has down for one resource."""

    capacity: int
    allocatable: int
    healthy: tuple[str, ...]
    unhealthy: tuple[str, ...]
    allocated: tuple[str, ...]


class Check(msgspec.Struct, frozen=True):
    """Whether the kubelet's books agree: one sentence for each invariant that does not hold."""

    violations: tuple[str, ...]
    resources: dict[str, ResourceBooks]


class RefusedPod(msgspec.Struct, frozen=True):
    """A pod that was not admitted again at a start of the kubelet, and is gone."""

    pod: str
    reason: str
    message: str


class KubeletError(Exception):
    """The kubelet did not do what was asked. `kind` is the harness's word for why (commandError in commands.go),
    `reason` the kubelet's own for a refused pod."""

    def __init__(self, kind: str, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.reason = reason


class AdmissionError(KubeletError, emulated.AdmissionError):
    """The kubelet refused the pod: its `reason` and message are what `kubectl describe` would show."""

    def __init__(self, pod: str, reason: str, message: str) -> None:
        super().__init__("admission", message, reason)
        self.pod = pod

    def __str__(self) -> str:
        return f"pod {self.pod} refused, {self.reason}: {self.message}"


class TopologyAffinityError(AdmissionError, emulated.TopologyAffinityError):
    """The topology policy refused it."""


class KubeletDiedError(KubeletError):
    """The kubelet's process ended, or none was started (status None). The message has the end of its log."""

    def __init__(self, status: int | None, log: str) -> None:
        what = "does not answer" if status is None else f"ended with status {status}"
        super().__init__("died", f"the kubelet {what}; the end of its log:\n{log}")
        self.status = status


class KubeletPanicError(KubeletDiedError, emulated.KubeletPanicError):
    """It crashed: the end of its log has the trace."""
