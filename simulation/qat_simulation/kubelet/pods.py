"""The emulated kubelet's pods: the devices and settings of each container, and the errors of admission."""

from typing import Generic, Protocol, TypeVar

from msgspec import Struct

from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb


class AdmissionError(Exception):
    """The pod is rejected; the text is the one that its status would show."""


class TopologyAffinityError(AdmissionError):
    """The topology policy rejects the pod."""


class KubeletPanicError(Exception):
    """The real kubelet would have crashed here."""


class ContainerDevices(Struct):
    """One container's devices of one resource, by NUMA node (-1 for none), and the plugin's encoded answer."""

    by_numa: dict[int, list[str]]
    answer: bytes

    @property
    def devices(self) -> set[str]:
        """All ids."""
        return {device for devices in self.by_numa.values() for device in devices}


Pods = dict[str, dict[str, dict[str, ContainerDevices]]]
"""Pod (namespace/name), container, resource."""


class ContainerSettings(Protocol):
    """The settings that one container is started with: device ids, variables, and paths on the host."""

    @property
    def devices(self) -> tuple[str, ...]: ...

    @property
    def envs(self) -> dict[str, str]: ...

    @property
    def device_nodes(self) -> tuple[str, ...]: ...

    @property
    def mounts(self) -> tuple[str, ...]: ...


_Container = TypeVar("_Container", bound=ContainerSettings)


class AdmittedPod(Struct, Generic[_Container], frozen=True):
    """The settings of a pod that some kubelet admitted, by container. The properties combine all containers."""

    containers: dict[str, _Container]

    @property
    def devices(self) -> tuple[str, ...]:
        """All ids, container by container."""
        return tuple(device for each in self.containers.values() for device in each.devices)

    @property
    def envs(self) -> dict[str, str]:
        """The environment variables; if several containers have the same one, the first one's value."""
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
    """The settings of one container; `device_nodes` and `mounts` are paths on the host."""

    devices: tuple[str, ...]
    envs: dict[str, str]
    device_nodes: tuple[str, ...]
    mounts: tuple[str, ...]


class Allocation(AdmittedPod[ContainerAllocation], frozen=True):
    """A pod that the emulated kubelet admitted."""


def container_settings(held: dict[str, ContainerDevices]) -> ContainerAllocation:
    """deviceRunContainerOptions: if resources give conflicting settings, the first one's are used."""
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
