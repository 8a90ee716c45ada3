"""Which devices a container should get (GetPreferredAllocation), and the environment that names them (Allocate).

    none      the first in address order
    packed    fill one PF before the next: first the PFs of must-include devices, then PFs with devices in use (the
              fewest free first, so that few PFs stay partly used), then unused PFs; ties by address
    balanced  repeatedly the PF with the fewest devices in use, counting those already chosen; ties by address

A device is in use if a pod holds it, according to PodResources and this server's own allocations. If that is unknown,
a device is in use if it is listed as healthy and not offered as available. That is an estimate: the kubelet mostly
offers all free devices, but not those of other NUMA nodes, and it does not cover held devices that are unhealthy.
If PFs are unknown (inside a VM), all devices on one bus count as one PF. Answers are in address order.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from heapq import heapify, heappop, heapreplace
from typing import Final

from qat_server.kubelet.device import Device
from qat_shared.pci import PciAddress

_UNCOUNTED: Final = -1
"""The number that stands for the PF of an unhealthy device. As index -1 it selects an extra last counter."""


class AllocationPolicy(StrEnum):
    """How the devices of a container are chosen."""

    NONE = "none"
    PACKED = "packed"
    BALANCED = "balanced"


class AllocationError(Exception):
    """The request cannot be satisfied; the message is one sentence for the pod's events."""


class AllocationIndex:
    """The devices of one resource, indexed for many requests: made once for each snapshot, never changed.

    Internally a device is represented by its rank in address order, and a PF by a number: both are cheap to sort and
    to count.
    """

    def __init__(self, devices: Iterable[Device]) -> None:
        self._devices = {device.address: device for device in devices}
        listed = sorted(self._devices.values(), key=lambda device: device.address)
        self._ids = [str(device.address) for device in listed]
        self._ranks_by_id = {device_id: rank for rank, device_id in enumerate(self._ids)}
        self._ranks_by_address = {device.address: rank for rank, device in enumerate(listed)}
        numbers: dict[PciAddress, int] = {}
        self._pfs = [numbers.setdefault(_pf_of(device), len(numbers)) for device in listed]
        self._counted_pfs = [pf if device.healthy else _UNCOUNTED for pf, device in zip(self._pfs, listed, strict=True)]
        counts = Counter(self._counted_pfs)
        self._healthy_by_pf = [counts[pf] for pf in (*range(len(numbers)), _UNCOUNTED)]

    def preferred(
        self,
        policy: AllocationPolicy,
        available: Sequence[str],
        must_include: Sequence[str],
        size: int,
        held: Collection[PciAddress] | None = None,
    ) -> list[str]:
        """Choose `size` of the `available` device IDs, including all of `must_include`. Raises AllocationError.

        `held`: the devices that pods hold, None if that is unknown.
        """
        _check(available, must_include, size)
        try:
            ranks = [self._ranks_by_id[device_id] for device_id in available]
        except KeyError:
            return self._with_unlisted(available).preferred(policy, available, must_include, size, held)
        must = [self._ranks_by_id[device_id] for device_id in must_include]
        free = sorted(set(ranks).difference(must) if must else ranks)
        wanted = size - len(must)
        if policy is AllocationPolicy.NONE or wanted in (0, len(free)):
            chosen = free[:wanted]
        else:
            in_use = self._count_unavailable(ranks) if held is None else self._count_held(held, ranks)
            choose = self._packed if policy is AllocationPolicy.PACKED else self._balanced
            chosen = choose(free, wanted, in_use, [self._pfs[rank] for rank in must])
        return [self._ids[rank] for rank in sorted(must + chosen)]

    def _count_unavailable(self, available: list[int]) -> list[int]:
        """For each PF, the number of healthy devices that are not available."""
        counts, pfs = self._healthy_by_pf.copy(), self._counted_pfs
        for rank in available:
            counts[pfs[rank]] -= 1
        return counts

    def _count_held(self, held: Collection[PciAddress], available: list[int]) -> list[int]:
        """For each PF, the number of held devices. A device that the kubelet offers as available is not held."""
        counts, offered = [0] * len(self._healthy_by_pf), frozenset(available)
        for address in held:
            rank = self._ranks_by_address.get(address)
            if rank is not None and rank not in offered:
                counts[self._pfs[rank]] += 1
        return counts

    def _packed(self, free: list[int], wanted: int, in_use: list[int], must_pfs: list[int]) -> list[int]:
        def order(item: tuple[int, list[int]]) -> tuple[bool, bool, int, int]:
            pf, ranks = item
            unused = pf not in must_pfs and not in_use[pf]
            return pf not in must_pfs, unused, 0 if unused else len(ranks), ranks[0]

        chosen: list[int] = []
        for _, ranks in sorted(self._by_pf(free).items(), key=order):
            chosen += ranks[: wanted - len(chosen)]
            if len(chosen) == wanted:
                break
        return chosen

    def _balanced(self, free: list[int], wanted: int, in_use: list[int], must_pfs: list[int]) -> list[int]:
        for pf in must_pfs:
            in_use[pf] += 1
        # (devices in use, rank of the next candidate, the candidates after it in reverse order) for each PF
        heap = [(in_use[pf], ranks[0], ranks[:0:-1]) for pf, ranks in self._by_pf(free).items()]
        heapify(heap)
        chosen: list[int] = []
        while len(chosen) < wanted:
            used, rank, later = heap[0]
            chosen.append(rank)
            if later:
                heapreplace(heap, (used + 1, later.pop(), later))
            else:
                heappop(heap)
        return chosen

    def _by_pf(self, ranks: list[int]) -> dict[int, list[int]]:
        pfs = self._pfs
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for rank in ranks:
            groups[pfs[rank]].append(rank)
        return groups

    def _with_unlisted(self, available: Sequence[str]) -> "AllocationIndex":
        """An index that also has the unlisted devices of `available`, with PFs derived from their addresses.

        The kubelet's list can be newer or older than ours for a moment. Raises AllocationError.
        """
        unlisted = []
        for device_id in available:
            if device_id not in self._ranks_by_id:
                try:
                    address = PciAddress.parse(device_id)
                except ValueError as error:
                    raise AllocationError(f"an available device has an invalid ID: {error}") from None
                unlisted.append(Device(address, None, None, (), (), reason="not listed"))
        return AllocationIndex([*self._devices.values(), *unlisted])


def environment(addresses: Iterable[PciAddress]) -> dict[str, str]:
    """QAT0, QAT1, ...: the addresses of the container's devices, in address order."""
    return {f"QAT{number}": str(address) for number, address in enumerate(sorted(addresses))}


def _pf_of(device: Device) -> PciAddress:
    # On most devices the PF is 00.0 of its VFs' bus, so this also joins an unlisted VF to its listed neighbours.
    return device.pf or PciAddress(device.address.domain, device.address.bus, 0, 0)


def _check(available: Sequence[str], must_include: Sequence[str], size: int) -> None:
    if size < 1:
        raise AllocationError(f"{size} devices are requested, but at least 1 is required")
    offered, included = set(available), set(must_include)
    for kind, ids, different in (("available", available, offered), ("must-include", must_include, included)):
        if len(ids) != len(different):
            device_id, times = Counter(ids).most_common(1)[0]
            raise AllocationError(f"device {device_id} is listed {times} times among the {len(ids)} {kind} devices")
    missing = sorted(included - offered)
    if missing:
        raise AllocationError(
            f"{len(missing)} of {len(must_include)} must-include devices are not among the {len(available)} "
            f"available: {', '.join(missing[:4])}"
        )
    if size < len(must_include):
        raise AllocationError(f"{size} devices are requested, fewer than the {len(must_include)} must-include devices")
    if size > len(available):
        raise AllocationError(f"{size} devices are requested, but only {len(available)} are available")
