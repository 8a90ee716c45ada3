"""Which pod holds which device: one List call to the kubelet's PodResources service (podresources/v1)."""

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
from qat_server.kubelet.sockets.kubelet_channel import PodResourcesDialer
from qat_shared import NAMESPACE
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress

log = logs.get(__name__)

_TIMEOUT: Final = 5.0  # seconds that the kubelet has to answer
_PREFIX: Final = f"{NAMESPACE}/"

Holders = Mapping[str, Mapping[PciAddress, Holder]]
"""Resource name without its namespace to a map of its held devices to their holders."""


def holder_names(holders: Holders) -> dict[PciAddress, str]:
    """Each device with its holder (namespace/pod/container), whatever its resource."""
    return {address: holder.name for held in holders.values() for address, holder in held.items()}


class Answer(Struct, frozen=True):
    """Which pods hold which devices. `pods`: how many pods the kubelet reports; with none, it may not know them yet."""

    holders: Holders
    pods: int


class PodResourcesError(Exception):
    """The holders are unknown; the message is one sentence with the reason. A retry may succeed."""


class PodResourcesUnavailableError(PodResourcesError):
    """No answer is possible: policy forbids the call, or this kubelet has no such service."""


class NoHelperError(PodResourcesError):
    """No helper is connected that could connect to the kubelet."""


class KubeletDownError(PodResourcesError):
    """The kubelet is not running."""


async def held_devices(helper: PodResourcesDialer, directory: Path, wait_ms: int = 0) -> Answer:
    """Call List, waiting up to `wait_ms` for the kubelet to listen.

    Only this user may be able to write to `directory` (see kubelet_channel.open_channel). Raises PodResourcesError.
    """
    try:
        connected = await helper.open_pod_resources(wait_ms)
    except HelperUnavailableError as error:
        raise NoHelperError(error.message) from error
    except HelperError as error:
        raise _connect_error(error) from error
    try:
        async with kubelet_channel.open_channel(connected, directory) as channel:
            answer = await PodResourcesListerStub(channel).List(pb.ListPodResourcesRequest(), timeout=_TIMEOUT)
    except OSError as error:
        raise PodResourcesError(f"cannot connect to the kubelet's PodResources service: {error}") from error
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise PodResourcesUnavailableError("the kubelet is too old: it has no PodResources v1 service") from error
        raise PodResourcesError(kubelet_channel.describe(error)) from error
    return Answer(_holders(answer), len(answer.pod_resources))


def _connect_error(error: HelperError) -> PodResourcesError:
    if error.code in (ErrorCode.DENIED, ErrorCode.UNSUPPORTED):
        return PodResourcesUnavailableError(error.message)
    return (KubeletDownError if error.code is ErrorCode.UNAVAILABLE else PodResourcesError)(error.message)


def _holders(answer: pb.ListPodResourcesResponse) -> dict[str, dict[PciAddress, Holder]]:
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
                        # Allocated by an earlier plugin under the same resource name: never one of our devices.
                        log.v(2, "pod holds a device whose ID is not a PCI address", device=text, pod=pod.name)
                        continue
                    holders[address] = holder
    return held
