"""The outcome for each VF of the node, by the server's status: bound, left alone, over the limit, failed or pending.

Pure. The demo waits until no VF is pending, and then prints each group.
"""

from collections.abc import Mapping, Sequence

from msgspec import Struct

from qat_server.devices.pci_bus import PF_DRIVERS, VF_DRIVERS
from qat_server.observability.status_format import Status, VfStatus
from qat_shared.pci import PciAddress
from qat_simulation.kernel.kernel import DeviceState
from qat_simulation.node.description import Node

DRIVER = "vfio-pci"


class VfOutcomes(Struct, frozen=True):
    """Each VF of the node in one group, in address order.

    `other_driver` maps VFs to a driver that the server leaves them on, `failed` maps VFs to reasons. `over_limit` are
    beyond --max-num-devices. `ignored` are VFs that the server does not serve: their PF is not on its kernel driver.
    """

    served: tuple[str, ...] = ()
    other_driver: Mapping[str, str] = {}
    failed: Mapping[str, str] = {}
    over_limit: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """The number of the node's VFs."""
        groups = (self.served, self.other_driver, self.failed, self.over_limit, self.ignored, self.pending)
        return sum(map(len, groups))

    def failures(self) -> list[str]:
        """Each reason once, with its VFs."""
        by_reason: dict[str, list[str]] = {}
        for vf, reason in self.failed.items():
            by_reason.setdefault(reason.replace(vf, "the VF"), []).append(vf)
        return [f"{summary(vfs)}: {reason}" for reason, vfs in by_reason.items()]


def outcomes(status: Status, node: Node, devices: Mapping[PciAddress, DeviceState]) -> VfOutcomes:
    """Group the kernel's present VFs (`devices`)."""
    lone = {PciAddress.parse(vf.address) for vf in node.vfs}
    pfs = {address for address, state in devices.items() if state.driver in PF_DRIVERS}
    by_address = {vf.address: vf for vf in status.vfs}
    groups: dict[str, dict[str, str]] = {name: {} for name in VfOutcomes.__struct_fields__}
    for address, state in devices.items():
        if state.pf is None and address not in lone:
            continue
        vf = str(address)
        if vf in by_address:
            group, reason = _group(by_address[vf])
        elif vf in status.cut:
            group, reason = "over_limit", ""
        else:
            # Without any PF (in a VM) the server serves every VF, else those of the PFs.
            group, reason = ("pending" if not pfs or state.pf in pfs else "ignored"), ""
        groups[group][vf] = reason
    return VfOutcomes(
        served=tuple(groups["served"]),
        other_driver=groups["other_driver"],
        failed=groups["failed"],
        over_limit=tuple(groups["over_limit"]),
        ignored=tuple(groups["ignored"]),
        pending=tuple(groups["pending"]),
    )


def _group(vf: VfStatus) -> tuple[str, str]:
    if vf.driver == DRIVER:
        return ("served" if vf.listed else "pending"), ""
    if vf.driver and vf.driver not in VF_DRIVERS:
        return "other_driver", vf.driver
    return ("failed" if vf.reason and not vf.listed else "pending"), vf.reason


def summary(vfs: Sequence[str]) -> str:
    """The number of VFs with the first and the last address, or the only address."""
    if len(vfs) < 2:
        return "".join(vfs)
    return f"{len(vfs)} VFs ({vfs[0]} .. {vfs[-1]})"
