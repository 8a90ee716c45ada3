"""Which pod holds which device: one question to the kubelet's PodResources service (podresources/v1, List)."""

from pathlib import Path
from typing import Final

import grpc
import grpc.aio

from qat_server import kubelet_channel, logs
from qat_server.generated import podresources_v1_pb2 as pb
from qat_server.generated.podresources_v1_pb2_grpc import PodResourcesListerStub
from qat_server.helper_client import HelperError, HelperUnavailableError
from qat_server.inventory import Holder
from qat_server.kubelet_channel import KubeletDialer
from qat_shared.messages import KubeletService
from qat_shared.pci import PciAddress

log = logs.get(__name__)

PREFIX: Final = "qat.intel.com/"
TIMEOUT: Final = 5.0
"""Seconds for the kubelet's answer."""


class PodResourcesError(Exception):
    """It is not known who holds what; the text says why, in one sentence."""


class NobodyToAskError(PodResourcesError):
    """There is no helper now that would connect to the kubelet."""


async def held_devices(
    helper: KubeletDialer, directory: Path, seconds: float = TIMEOUT
) -> dict[str, dict[PciAddress, Holder]]:
    """Resource name without its namespace, to device, to its holder.

    `directory` is the server's own (see kubelet_channel.over). Raises PodResourcesError.
    """
    try:
        connected = await helper.open_kubelet_socket(KubeletService.POD_RESOURCES)
    except HelperUnavailableError as error:
        raise NobodyToAskError(error.message) from error
    except HelperError as error:
        raise PodResourcesError(error.message) from error
    try:
        async with kubelet_channel.over(connected, directory) as channel:
            answer = await PodResourcesListerStub(channel).List(pb.ListPodResourcesRequest(), timeout=seconds)
    except OSError as error:
        raise PodResourcesError(f"cannot speak to the kubelet's PodResources service: {error}") from error
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise PodResourcesError("the kubelet is too old: it has no PodResources v1 service") from error
        raise PodResourcesError(kubelet_channel.sentence(error)) from error
    return _read(answer)


def _read(answer: pb.ListPodResourcesResponse) -> dict[str, dict[PciAddress, Holder]]:
    held: dict[str, dict[PciAddress, Holder]] = {}
    for pod in answer.pod_resources:
        for container in pod.containers:
            for devices in container.devices:
                if not devices.resource_name.startswith(PREFIX):
                    continue
                holders = held.setdefault(devices.resource_name.removeprefix(PREFIX), {})
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
