"""A State with something in every field: for the tests of status, metrics and the status screen."""

from typing import Any

import msgspec

from qat_server.devices.inventory import Inventory, PhysicalFunction, Problem, VirtualFunction
from qat_server.helper_client.client import HelperState
from qat_server.kubelet.device import Device
from qat_server.kubelet.endpoint import EndpointState
from qat_server.observability.state import State
from qat_server.provisioning.progress import Progress, Stage
from qat_shared.pci import PciAddress

PF = PciAddress(0, 0x6B, 0, 0)
VFS = [PciAddress(0, 0x6B, 0, function) for function in range(1, 6)]


def vf(address: PciAddress, **other: Any) -> VirtualFunction:
    fields: dict[str, Any] = {"driver": "vfio-pci", "in_use": False} | other
    return VirtualFunction(
        address=address, device_id=0x4941, pf=PF, numa_node=0, iommu_group=7, noiommu=False, uio=None, **fields
    )


def device(address: PciAddress, reason: str = "") -> Device:
    return Device(address=address, pf=PF, numa_node=0, nodes=("/dev/vfio/7",), mounts=(), reason=reason)


def full_state() -> State:
    """One PF; VFs: 1 idle, 2 held, 3 foreign, 4 cannot be bound, 5 listed and vanished; a sixth is cut."""
    return State(
        inventory=Inventory(
            pfs=(
                PhysicalFunction(
                    address=PF,
                    device_id=0x4940,
                    driver="4xxx",
                    numa_node=0,
                    state="up",
                    services="sym;asym",
                    total_vfs=16,
                    vfs=tuple(VFS[:4]),
                ),
            ),
            vfs=(
                vf(VFS[0]),
                vf(VFS[1], in_use=True),
                vf(VFS[2], driver="4xxxvf", in_use=None),
                vf(VFS[3], driver=None, in_use=None),
            ),
            cut=(PciAddress(0, 0x6B, 0, 6),),
            problems=(Problem(None, "the bus is odd"), Problem(PF, "numa_node: not a number")),
        ),
        listing={"cy": (device(VFS[0]), device(VFS[1], "PF is down"), device(VFS[4], "vanished"))},
        names=dict.fromkeys(VFS[:4], "cy"),
        unhealthy={PF: "PF 0000:6b:00.0 is down"},
        heartbeats={PF: False},
        endpoints={"cy": EndpointState(True, 2, ""), "dc": EndpointState(False, 1, "connection refused")},
        helper=HelperState(True, "0.1.0", "", 17, "ab" * 32, "the helper's audit log went back"),
        foreign={VFS[2]: "qat_other"},
        failures={VFS[3]: "the kernel refused"},
        held={VFS[1]: "default/pod/main"},
        waits_for="another server is running",
        uevents=9,
        uevent_overruns=1,
    )


def provisioning_state() -> State:
    """The same, with one PF that waits for holders of its VFs, one that failed, and an invalid configuration."""
    held = Progress(Stage.WAITING, "dc, all VFs", ("services dc", "16 VFs"), ("default/pod/main", "a process"))
    failed = Progress(Stage.FAILED, "dc, all VFs", ("services dc",), reason="the kernel refused")
    return msgspec.structs.replace(
        full_state(),
        provisioning={PciAddress.parse("0000:70:00.0"): failed, PciAddress.parse("0000:6b:00.0"): held},
        provisioning_error="qat.conf line 1: no",
    )
