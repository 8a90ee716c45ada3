"""Which pod holds which device: one question to the kubelet's PodResources service (podresources/v1, List)."""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
from msgspec import Struct

from qat_server import logs
from qat_server.helper_client.client import HelperError, HelperUnavailableError
from qat_server.kubelet.device import Holder
from qat_server.kubelet.generated import podresources_v1_pb2 as pb
from qat_server.kubelet.generated.podresources_v1_pb2_grpc import PodResourcesListerStub
from qat_server.kubelet.sockets import kubelet_channel
from qat_server.kubelet.sockets.kubelet_channel import KubeletDialer
from qat_shared import NAMESPACE
from qat_shared.messages import ErrorCode, KubeletService
from qat_shared.pci import PciAddress

log = logs.get(__name__)

TIMEOUT: Final = 5.0
"""Seconds for the kubelet's answer."""
_PREFIX: Final = f"{NAMESPACE}/"
_NO_SUCH_SOCKET: Final = (errno.ENOENT, errno.ENOTDIR)

Holders = Mapping[str, Mapping[PciAddress, Holder]]
"""Resource name without its namespace, to device, to its holder."""


class Answer(Struct, frozen=True):
    """Who holds what. `pods` counts all pods named: a kubelet that names none may only not know them yet."""

    holders: Holders
    pods: int


class PodResourcesError(Exception):
    """It is not known who holds what; the text says why, in one sentence. Another attempt may fare better."""


class NeverAnsweredError(PodResourcesError):
    """There is no answer to be had: forbidden by policy, or this kubelet has no such service."""


class NobodyToAskError(PodResourcesError):
    """There is no helper now that would connect to the kubelet."""


class KubeletAwayError(PodResourcesError):
    """The kubelet does not run."""


async def held_devices(helper: KubeletDialer, directory: Path, seconds: float = TIMEOUT, wait_ms: int = 0) -> Answer:
    """Ask, waiting up to `wait_ms` for the kubelet to be there.

    `directory` is the server's own (see kubelet_channel.over). Raises PodResourcesError.
    """
    try:
        connected = await helper.open_kubelet_socket(KubeletService.POD_RESOURCES, wait_ms)
    except HelperUnavailableError as error:
        raise NobodyToAskError(error.message) from error
    except HelperError as error:
        raise await _not_connected(helper, error) from error
    try:
        async with kubelet_channel.over(connected, directory) as channel:
            answer = await PodResourcesListerStub(channel).List(pb.ListPodResourcesRequest(), timeout=seconds)
    except OSError as error:
        raise PodResourcesError(f"cannot speak to the kubelet's PodResources service: {error}") from error
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise NeverAnsweredError("the kubelet is too old: it has no PodResources v1 service") from error
        raise PodResourcesError(kubelet_channel.sentence(error)) from error
    return Answer(_read(answer), len(answer.pod_resources))


async def _not_connected(helper: KubeletDialer, error: HelperError) -> PodResourcesError:
    if error.code is ErrorCode.DENIED:
        return NeverAnsweredError(error.message)
    if error.code is not ErrorCode.UNAVAILABLE:
        return PodResourcesError(error.message)
    # A socket that refuses was left by a kubelet that had the service. Without a socket, either there is no kubelet or
    # it has no such service: whether it listens where plugins register tells which.
    if error.errno in _NO_SUCH_SOCKET and await _kubelet_runs(helper):
        return NeverAnsweredError(error.message)
    return KubeletAwayError(error.message)


async def _kubelet_runs(helper: KubeletDialer) -> bool:
    """Whether it does, or that cannot be known."""
    try:
        (await helper.open_kubelet_socket(KubeletService.REGISTRATION)).close()
    except HelperError as error:
        return error.code is ErrorCode.DENIED
    return True


def _read(answer: pb.ListPodResourcesResponse) -> dict[str, dict[PciAddress, Holder]]:
    held: dict[str, dict[PciAddress, Holder]] = {}
    for pod in answer.pod_resources:
        for container in pod.containers:
            for devices in container.devices:
                if not devices.resource_name.startswith(_PREFIX):
                    continue
                holders = held.setdefault(devices.resource_name.removeprefix(_PREFIX), {})
                nodes = devices.topology.nodes
                holder = Holder(f"{pod.namespace}/{pod.name}/{container.name}", nodes[0].ID if nodes else None)
                for text in devices.device_ids:
                    try:
                        address = PciAddress.parse(text)
                    except ValueError:
                        # Given out by another plugin under the same name, before this one: never one of our devices.
                        log.v(2, "pod holds a device that is no PCI address", device=text, pod=pod.name)
                        continue
                    holders[address] = holder
    return held
