"""One list of devices with everything that the DevicePlugin service looks up to answer a request. Immutable."""

from collections.abc import Iterable
from typing import Final

from qat_server.kubelet.allocation import AllocationIndex
from qat_server.kubelet.device import Device
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb

HEALTHY: Final = "Healthy"
UNHEALTHY: Final = "Unhealthy"


class ListedDevice:
    """A device and its part of each answer: `listed` for ListAndWatch, `specs` and `mounts` for Allocate."""

    __slots__ = ("device", "listed", "mounts", "specs")

    def __init__(self, device: Device) -> None:
        self.device = device
        self.listed = _listed(device)
        self.specs = tuple(
            (node, pb.DeviceSpec(container_path=node, host_path=node, permissions="rw")) for node in device.nodes
        )
        self.mounts = tuple((path, pb.Mount(container_path=path, host_path=path)) for path in device.mounts)


class Snapshot:
    """`devices` by ID, the IDs of the `healthy` ones, the allocation `index`, and the ListAndWatch `message`.

    Unchanged devices are taken over from the `previous` snapshot. If the message has not changed, it is the same object
    as before, so that streams can compare by identity.
    """

    __slots__ = ("devices", "healthy", "index", "message")

    def __init__(self, devices: Iterable[Device], previous: "Snapshot | None" = None) -> None:
        known = {} if previous is None else previous.devices
        self.devices: dict[str, ListedDevice] = {}
        for device in devices:
            device_id = str(device.address)
            listed = known.get(device_id)
            self.devices[device_id] = ListedDevice(device) if listed is None or listed.device != device else listed
        self.healthy = frozenset(device_id for device_id, listed in self.devices.items() if listed.device.healthy)
        self.index = AllocationIndex([listed.device for listed in self.devices.values()])
        message = pb.ListAndWatchResponse(devices=[listed.listed for listed in self.devices.values()])
        self.message: pb.ListAndWatchResponse = (
            previous.message if previous is not None and previous.message == message else message
        )


def _listed(device: Device) -> pb.Device:
    health = HEALTHY if device.healthy else UNHEALTHY
    if device.numa_node is None:
        return pb.Device(ID=str(device.address), health=health)
    topology = pb.TopologyInfo(nodes=[pb.NUMANode(ID=device.numa_node)])
    return pb.Device(ID=str(device.address), health=health, topology=topology)
