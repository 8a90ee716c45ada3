"""What has become of each VF of the node, as the server tells it: bound, left alone, cut, failed, or not yet decided.

Pure. The demo waits until nothing is undecided any more, and then says each group by its name.
"""

from collections.abc import Mapping

from msgspec import Struct

from qat_server.devices.pci_bus import PF_DRIVERS, VF_DRIVERS
from qat_server.observability.status import Status, VfStatus
from qat_shared.pci import PciAddress
from qat_simulation.kernel.kernel import DeviceState
from qat_simulation.node.description import Node

DRIVER = "vfio-pci"


class Groups(Struct, frozen=True):
    """Each VF of the node in one group, in address order; `foreign` and `failed` by VF: driver, and reason.

    `unseen` are VFs that the server does not look for: their PF is not on its kernel driver.
    """

    served: tuple[str, ...] = ()
    foreign: Mapping[str, str] = {}
    failed: Mapping[str, str] = {}
    cut: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All VFs of the node."""
        parts = (self.served, self.foreign, self.failed, self.cut, self.unseen, self.undecided)
        return sum(map(len, parts))

    def failures(self) -> list[str]:
        """Each reason once, with the number of VFs that it is the reason of."""
        by_reason: dict[str, list[str]] = {}
        for vf, reason in self.failed.items():
            by_reason.setdefault(reason.replace(vf, "the VF"), []).append(vf)
        return [f"{spans(vfs)}: {reason}" for reason, vfs in by_reason.items()]


def groups_of(status: Status, node: Node, devices: Mapping[PciAddress, DeviceState]) -> Groups:
    """Group the VFs that the kernel has now (`devices`)."""
    alone = {PciAddress.parse(vf.address) for vf in node.vfs}
    pfs = {address for address, state in devices.items() if state.driver in PF_DRIVERS}
    told = {vf.address: vf for vf in status.vfs}
    parts: dict[str, dict[str, str]] = {name: {} for name in Groups.__struct_fields__}
    for address, state in devices.items():
        if state.pf is None and address not in alone:
            continue
        vf = str(address)
        if vf in told:
            name, why = _group(told[vf])
        elif vf in status.cut:
            name, why = "cut", ""
        else:
            # Without any PF (in a VM) the server looks at every VF, else at those of the PFs.
            name, why = ("undecided" if not pfs or state.pf in pfs else "unseen"), ""
        parts[name][vf] = why
    return Groups(
        served=tuple(parts["served"]),
        foreign=parts["foreign"],
        failed=parts["failed"],
        cut=tuple(parts["cut"]),
        unseen=tuple(parts["unseen"]),
        undecided=tuple(parts["undecided"]),
    )


def _group(vf: VfStatus) -> tuple[str, str]:
    if vf.driver == DRIVER:
        return ("served" if vf.listed else "undecided"), ""
    if vf.driver and vf.driver not in VF_DRIVERS:
        return "foreign", vf.driver
    return ("failed" if vf.reason and not vf.listed else "undecided"), vf.reason


def spans(vfs: "tuple[str, ...] | list[str]") -> str:
    """How many, and the first and last of them."""
    if len(vfs) < 2:
        return "".join(vfs)
    return f"{len(vfs)} VFs ({vfs[0]} .. {vfs[-1]})"
