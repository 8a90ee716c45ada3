"""What a node should come to in a random sequence of events: what is healthy, and who has what."""

from enum import StrEnum
from typing import Final

from kubelet.nodes import CY, DC, GENERIC, LONE, SMALL
from qat_simulation.node.description import Node, Pf

OTHER: Final = "other"
"""A pod that has none of our devices."""
_CONFIGURATIONS: Final = {CY: {"qat.conf": "ServicesEnabled=sym;asym\n"}, DC: {"qat.conf": "ServicesEnabled=dc\n"}}
_PROVISIONED: Final = Node(
    pfs=tuple(Pf(address=pf.address, services="dc", total_vfs=2, num_vfs=0, numa_node=pf.numa_node) for pf in SMALL.pfs)
)


class Kind(StrEnum):
    VM = "in a VM"
    """Four lone VFs, which go and come back one by one."""
    PFS = "two PFs"
    """With two VFs each, which go and come back together."""
    PROVISIONED = "two PFs that are provisioned"
    """The same, without VFs at first: they are made, and their services may change."""


class Model:
    """Told of each event before it happens, but for `pods`, which are as the kubelet has admitted them."""

    def __init__(self, kind: Kind, drain: bool) -> None:
        self.kind = kind
        self.drain = drain
        self.pods: dict[str, set[str]] = {}
        self.gone: set[str] = set()  # lone VFs
        self.off: set[str] = set()  # PFs without VFs
        self.sick: set[str] = set()  # PFs without a heartbeat
        self.pfs = () if kind is Kind.VM else tuple(pf.address for pf in SMALL.pfs)
        self.wanted = CY
        self.served = dict.fromkeys(self.pfs, CY)

    def node(self) -> Node:
        """As it is at first."""
        return {Kind.VM: LONE, Kind.PFS: SMALL, Kind.PROVISIONED: _PROVISIONED}[self.kind]

    def configuration(self) -> dict[str, str]:
        """The provisioning configuration's files."""
        return _CONFIGURATIONS[self.wanted]

    def vf(self, number: int) -> str:
        """One of the VFs, which may not be there."""
        return LONE.vfs[number].address if self.kind is Kind.VM else f"{self.pfs[number % 2][:-1]}{1 + number // 2}"

    def resource(self, number: int) -> str:
        """One for a pod to ask for."""
        if self.kind is Kind.PROVISIONED:
            return (CY, DC)[number % 2]
        return GENERIC if self.kind is Kind.VM else CY

    def heartbeat(self, number: int, alive: bool) -> str:
        """Of a PF: its address."""
        pf = self.pfs[number % 2]
        (self.sick.discard if alive else self.sick.add)(pf)
        return pf

    def take_away(self, number: int) -> str:
        """The lone VF or the PF whose VFs are to go; empty when it has gone already, or it is services that change."""
        if self.kind is Kind.PROVISIONED:
            self.wanted = (CY, DC)[number % 2]
            return ""
        gone, address = (self.gone, self.vf(number)) if self.kind is Kind.VM else (self.off, self.pfs[number % 2])
        if address in gone:
            return ""
        gone.add(address)
        return address

    def all_are_back(self) -> None:
        self.gone.clear()
        self.off.clear()

    def settle(self) -> None:
        """PFs change to the services that are wanted, unless a pod has one of their VFs."""
        for pf in self.pfs:
            if not self._held(pf):
                self.served[pf] = self.wanted

    def allocatable(self) -> dict[str, int]:
        """By resource, how many devices are healthy once all is settled: what was unbound by hand is bound again."""
        if self.kind is Kind.VM:
            return {GENERIC: len(LONE.vfs) - len(self.gone)}
        healthy = {CY: 0, DC: 0} if self.kind is Kind.PROVISIONED else {CY: 0}
        for pf in set(self.pfs) - self.off - self.sick:
            drained = self.drain and self.served[pf] != self.wanted
            healthy[self.served[pf]] += len(self._held(pf)) if drained else 2
        return healthy

    def _held(self, pf: str) -> set[str]:
        """The VFs of a PF that pods have."""
        return {id_ for devices in self.pods.values() for id_ in devices if id_.startswith(pf[:-1])}
