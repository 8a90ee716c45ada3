"""The emulated kubelet's gRPC services, Registration and PodResources v1, and its checks of a registration.

They have no state: the device manager and kubelet.py have it.
"""

# ruff: noqa: N802 - the RPCs' names are the protocol's

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeAlias

import grpc
import grpc.aio

from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated import podresources_v1_pb2 as resources_pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import RegistrationServicer
from qat_server.kubelet.generated.podresources_v1_pb2_grpc import PodResourcesListerServicer
from qat_simulation.kubelet.device_manager import NO_NUMA, DeviceManager
from qat_simulation.kubelet.pods import ContainerDevices

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"

SUPPORTED_VERSIONS: Final = ("v1beta1",)
_DOMAIN: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", re.ASCII)


class RegisterRefusedError(Exception):
    """Register fails; the text is the real kubelet's."""


def check_request(version: str, resource: str) -> None:
    """The checks of plugin/v1beta1/server.go, Register, with the same messages. Raises RegisterRefusedError."""
    if version not in SUPPORTED_VERSIONS:
        supported = " ".join(f'"{version}"' for version in SUPPORTED_VERSIONS)
        raise RegisterRefusedError(
            f'requested API version "{version}" is not supported by kubelet. Supported version is [{supported}]'
        )
    if not is_extended_resource(resource):
        raise RegisterRefusedError(f'the ResourceName "{resource}" is invalid')


def check_plugin(name: str, versions: Sequence[str]) -> None:
    """The checks of plugin/v1beta1/handler.go, ValidatePlugin, with the same messages. Raises RegisterRefusedError."""
    if not set(SUPPORTED_VERSIONS) & set(versions):
        reason = f"manager version, {SUPPORTED_VERSIONS[0]}, is not among plugin supported versions"
        raise RegisterRefusedError(f"plugin validation failed with err: {reason} [{' '.join(versions)}]")
    if not is_extended_resource(name):
        reason = f'invalid name of device plugin socket: the ResourceName "{name}" is invalid'
        raise RegisterRefusedError(f"plugin validation failed with err: {reason}")


def is_extended_resource(name: str) -> bool:
    """IsExtendedResourceName: a domain that is not kubernetes.io, a slash, a name."""
    domain, slash, rest = name.partition("/")
    if not slash or "kubernetes.io/" in name or name.startswith("requests."):
        return False
    return bool(len(f"requests.{domain}") <= 253 and _DOMAIN.fullmatch(domain) and _NAME.fullmatch(rest))


class Registration(RegistrationServicer):
    """Passes each request to `register`, which raises RegisterRefusedError."""

    def __init__(self, register: Callable[[pb.RegisterRequest], Awaitable[None]]) -> None:
        self._register = register

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.Empty:
        """Answers once the plugin's endpoint is connected."""
        try:
            await self._register(request)
        except RegisterRefusedError as error:
            await context.abort(grpc.StatusCode.UNKNOWN, str(error))
        return pb.Empty()


class PodResources(PodResourcesListerServicer):
    """Reports the active pods and the devices that their containers hold."""

    def __init__(self, manager: Callable[[], DeviceManager], pods: Callable[[], Mapping[str, tuple[str, ...]]]) -> None:
        self._manager = manager
        self._pods = pods

    async def List(
        self, request: resources_pb.ListPodResourcesRequest, context: Context
    ) -> resources_pb.ListPodResourcesResponse:
        """All pods, also those without devices."""
        self._manager().collect()
        return resources_pb.ListPodResourcesResponse(pod_resources=[self._pod(pod) for pod in self._pods()])

    async def GetAllocatableResources(
        self, request: resources_pb.AllocatableResourcesRequest, context: Context
    ) -> resources_pb.AllocatableResourcesResponse:
        """All healthy devices, allocated or not."""
        answer = resources_pb.AllocatableResourcesResponse()
        for resource, devices in self._manager().healthy_devices().items():
            for device in devices:
                nodes = [resources_pb.NUMANode(ID=node.ID) for node in device.topology.nodes]
                topology = resources_pb.TopologyInfo(nodes=nodes) if nodes else None
                answer.devices.add(resource_name=resource, device_ids=[device.ID], topology=topology)
        return answer

    async def Get(
        self, request: resources_pb.GetPodResourcesRequest, context: Context
    ) -> resources_pb.GetPodResourcesResponse:
        """One pod."""
        pod = f"{request.pod_namespace}/{request.pod_name}"
        if pod not in self._pods():
            await context.abort(
                grpc.StatusCode.UNKNOWN, f"pod {request.pod_name} in namespace {request.pod_namespace} not found"
            )
        return resources_pb.GetPodResourcesResponse(pod_resources=self._pod(pod))

    def _pod(self, pod: str) -> resources_pb.PodResources:
        namespace, _, name = pod.partition("/")
        answer = resources_pb.PodResources(name=name, namespace=namespace)
        held = self._manager().pods.get(pod, {})
        for container in self._pods()[pod]:
            _fill(answer.containers.add(name=container), held.get(container, {}))
        return answer


def _fill(answer: resources_pb.ContainerResources, held: Mapping[str, ContainerDevices]) -> None:
    for resource, devices in held.items():
        for node, ids in sorted(devices.by_numa.items()):
            topology = None if node == NO_NUMA else resources_pb.TopologyInfo(nodes=[resources_pb.NUMANode(ID=node)])
            answer.devices.add(resource_name=resource, device_ids=ids, topology=topology)
