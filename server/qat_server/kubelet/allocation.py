"""Which devices a container should get (GetPreferredAllocation), and the environment that tells it (Allocate).

    none      the first in address order
    packed    one PF after the other: first those of must-include devices, then those with devices in use (the one with
              the fewest free first, so that few PFs stay partly used), then untouched ones; ties by address
    balanced  again and again the PF with the fewest devices in use, counting those chosen so far; ties by address

A device is in use when a pod holds it, as PodResources and this server's own answers say. Where that is not known, it
is when it is listed as healthy and not offered as available: mostly the kubelet offers all that are free, but not those
of other NUMA nodes, and of a held device that is unhealthy this cannot tell.
Where no PF is known (inside a VM), all devices on one bus count as one PF. Answers are in address order.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from heapq import heapify, heappop, heapreplace
from typing import Final

from qat_server.kubelet.device import Device
from qat_shared.pci import PciAddress

_UNCOUNTED: Final = -1
"""Stands for the PF of a device that is not healthy, and so not in use, offered or not: the last place of a list."""


class AllocationPolicy(StrEnum):
    """How a container's devices are chosen."""

    NONE = "none"
    PACKED = "packed"
    BALANCED = "balanced"


class AllocationError(Exception):
    """The request cannot be met; the message is one sentence for the pod's events."""


class AllocationIndex:
    """The devices of one resource, prepared for many requests: made once for each snapshot, never changed.

    In here a device is its rank in address order, and a PF a number: they are cheap to sort and to count.
    """

    def __init__(self, devices: Iterable[Device]) -> None:
        self._devices = {device.address: device for device in devices}
        listed = sorted(self._devices.values(), key=lambda device: device.address)
        self._ids = [str(device.address) for device in listed]
        self._ranks = {device_id: rank for rank, device_id in enumerate(self._ids)}
        self._places = {device.address: rank for rank, device in enumerate(listed)}
        numbers: dict[PciAddress, int] = {}
        self._pfs = [numbers.setdefault(_pf_of(device), len(numbers)) for device in listed]
        self._counted = [pf if device.healthy else _UNCOUNTED for pf, device in zip(self._pfs, listed, strict=True)]
        counts = Counter(self._counted)
        self._healthy_of = [counts[pf] for pf in (*range(len(numbers)), _UNCOUNTED)]

    def preferred(
        self,
        policy: AllocationPolicy,
        available: Sequence[str],
        must_include: Sequence[str],
        size: int,
        held: Collection[PciAddress] | None = None,
    ) -> list[str]:
        """Choose `size` of the `available` ids, all of `must_include` among them. Raises AllocationError.

        `held`: the devices that pods hold, None where that is not known.
        """
        _check(available, must_include, size)
        try:
            ranks = [self._ranks[device_id] for device_id in available]
        except KeyError:
            return self._with_unlisted(available).preferred(policy, available, must_include, size, held)
        must = [self._ranks[device_id] for device_id in must_include]
        free = sorted(set(ranks).difference(must) if must else ranks)
        wanted = size - len(must)
        if policy is AllocationPolicy.NONE or wanted in (0, len(free)):
            chosen = free[:wanted]
        else:
            in_use = self._not_offered(ranks) if held is None else self._held(held, ranks)
            choose = self._packed if policy is AllocationPolicy.PACKED else self._balanced
            chosen = choose(free, wanted, in_use, [self._pfs[rank] for rank in must])
        return [self._ids[rank] for rank in sorted(must + chosen)]

    def _not_offered(self, ranks: list[int]) -> list[int]:
        """By PF: how many are healthy and not among `ranks`."""
        numbers, counted = self._healthy_of.copy(), self._counted
        for rank in ranks:
            numbers[counted[rank]] -= 1
        return numbers

    def _held(self, held: Collection[PciAddress], ranks: list[int]) -> list[int]:
        """By PF: how many are held. One that is offered is not, whatever was known of it."""
        numbers, offered = [0] * len(self._healthy_of), frozenset(ranks)
        for address in held:
            rank = self._places.get(address)
            if rank is not None and rank not in offered:
                numbers[self._pfs[rank]] += 1
        return numbers

    def _packed(self, free: list[int], wanted: int, in_use: list[int], must_pfs: list[int]) -> list[int]:
        def order(item: tuple[int, list[int]]) -> tuple[bool, bool, int, int]:
            pf, ranks = item
            untouched = pf not in must_pfs and not in_use[pf]
            return pf not in must_pfs, untouched, 0 if untouched else len(ranks), ranks[0]

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
        """For the moment in which the kubelet's list is newer or older than ours: the PF is told by the address."""
        unlisted = []
        for device_id in available:
            if device_id not in self._ranks:
                try:
                    address = PciAddress.parse(device_id)
                except ValueError as error:
                    raise AllocationError(f"an available device's id is no device's: {error}") from None
                unlisted.append(Device(address, None, None, (), (), reason="not listed"))
        return AllocationIndex([*self._devices.values(), *unlisted])


def environment(addresses: Iterable[PciAddress]) -> dict[str, str]:
    """QAT0, QAT1, ...: the addresses of one container's devices, in address order."""
    return {f"QAT{number}": str(address) for number, address in enumerate(sorted(addresses))}


def _pf_of(device: Device) -> PciAddress:
    # On most devices the PF is 00.0 of its VFs' bus, so this also joins an unlisted VF to its listed neighbours.
    return device.pf or PciAddress(device.address.domain, device.address.bus, 0, 0)


def _check(available: Sequence[str], must_include: Sequence[str], size: int) -> None:
    if size < 1:
        raise AllocationError(f"{size} devices are asked for: at least 1 must be")
    offered, included = set(available), set(must_include)
    for what, ids, different in (("available", available, offered), ("must-include", must_include, included)):
        if len(ids) != len(different):
            twice, times = Counter(ids).most_common(1)[0]
            raise AllocationError(f"device {twice} is named {times} times among the {len(ids)} {what} devices")
    missing = sorted(included - offered)
    if missing:
        raise AllocationError(
            f"{len(missing)} of {len(must_include)} must-include devices are not among the {len(available)} "
            f"available: {', '.join(missing[:4])}"
        )
    if size < len(must_include):
        raise AllocationError(f"{size} devices are asked for, fewer than the {len(must_include)} to be included")
    if size > len(available):
        raise AllocationError(f"{size} devices are asked for, but only {len(available)} are available")
