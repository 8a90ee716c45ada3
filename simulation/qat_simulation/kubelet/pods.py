"""What the emulated kubelet knows of pods: what each container holds, and what a container is started with."""

from typing import Generic, Protocol, TypeVar

from msgspec import Struct

from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb


class Held(Struct):
    """What one container got of one resource: devices by NUMA node (-1 for none), and the plugin's answer."""

    by_numa: dict[int, list[str]]
    answer: bytes

    @property
    def devices(self) -> set[str]:
        """All ids."""
        return {device for devices in self.by_numa.values() for device in devices}


Pods = dict[str, dict[str, dict[str, Held]]]
"""Pod (namespace/name), container, resource."""


class Given(Protocol):
    """What one container is started with: device ids, and paths on the host."""

    @property
    def devices(self) -> tuple[str, ...]: ...

    @property
    def envs(self) -> dict[str, str]: ...

    @property
    def device_nodes(self) -> tuple[str, ...]: ...

    @property
    def mounts(self) -> tuple[str, ...]: ...


_Container = TypeVar("_Container", bound=Given)


class AdmittedPod(Struct, Generic[_Container], frozen=True):
    """What a pod got from some kubelet, by container. The properties are of all containers together."""

    containers: dict[str, _Container]

    @property
    def devices(self) -> tuple[str, ...]:
        """All ids, container by container."""
        return tuple(device for each in self.containers.values() for device in each.devices)

    @property
    def envs(self) -> dict[str, str]:
        """The environment; of several containers, whose variables have the same names, the first one's counts."""
        merged: dict[str, str] = {}
        for each in self.containers.values():
            merged = each.envs | merged
        return merged

    @property
    def device_nodes(self) -> tuple[str, ...]:
        """All device files, each once."""
        return tuple(dict.fromkeys(node for each in self.containers.values() for node in each.device_nodes))

    @property
    def mounts(self) -> tuple[str, ...]:
        """All mounts, each once."""
        return tuple(dict.fromkeys(mount for each in self.containers.values() for mount in each.mounts))


class ContainerAllocation(Struct, frozen=True):
    """What a container is started with; `device_nodes` and `mounts` are paths on the host."""

    devices: tuple[str, ...]
    envs: dict[str, str]
    device_nodes: tuple[str, ...]
    mounts: tuple[str, ...]


class Allocation(AdmittedPod[ContainerAllocation], frozen=True):
    """What a pod got from the emulated kubelet."""


def started_with(held: dict[str, Held]) -> ContainerAllocation:
    """deviceRunContainerOptions: of settings in which resources contradict each other, the first stays."""
    devices: list[str] = []
    envs: dict[str, str] = {}
    nodes: dict[str, None] = {}
    mounts: dict[str, None] = {}
    for each in held.values():
        answer = pb.ContainerAllocateResponse.FromString(each.answer)
        devices += sorted(each.devices)
        envs = dict(answer.envs) | envs
        nodes |= dict.fromkeys(device.host_path for device in answer.devices)
        mounts |= dict.fromkeys(mount.host_path for mount in answer.mounts)
    return ContainerAllocation(tuple(devices), dict(sorted(envs.items())), tuple(nodes), tuple(mounts))
