"""Which devices a container had best get (GetPreferredAllocation), and the environment that names them. Pure.

All policies honour the devices that must be included, and count them. PFs are compared by address.

    none      the first in address order
    packed    one PF after the other: those already begun first, then in address order
    balanced  one from the PF with the least in use at a time; in use is what is healthy, listed and not available
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from qat_server.inventory import Device
from qat_shared.pci import PciAddress

_Pf = tuple[int, ...]


class AllocationPolicy(StrEnum):
    """How devices are chosen."""

    NONE = "none"
    PACKED = "packed"
    BALANCED = "balanced"


class AllocationError(Exception):
    """The kubelet asked for what cannot be: one sentence with the numbers."""


def preferred(
    policy: AllocationPolicy,
    available: Sequence[PciAddress],
    must_include: Sequence[PciAddress],
    size: int,
    devices: Mapping[PciAddress, Device],
) -> list[PciAddress]:
    """`size` of the `available` addresses, `must_include` among them, in address order. Raises AllocationError.

    `devices` are all of the resource: they tell each one's PF and what is in use.
    """
    _check(available, must_include, size)
    chosen = list(must_include)
    taken = set(must_include)
    free = sorted((address for address in available if address not in taken), key=_key)
    missing = size - len(chosen)
    if policy is AllocationPolicy.NONE or missing == 0 or missing == len(free):
        chosen += free[:missing]
    else:
        by_pf: defaultdict[_Pf, list[PciAddress]] = defaultdict(list)
        for address in free:
            by_pf[_pf(address, devices)].append(address)
        used = _used(available, must_include, devices)
        pick = _packed if policy is AllocationPolicy.PACKED else _balanced
        chosen += pick(by_pf, used, missing)
    return sorted(chosen, key=_key)


def environment(addresses: Iterable[PciAddress]) -> dict[str, str]:
    """QAT0 to QATn-1: the addresses in address order."""
    return {f"QAT{number}": str(address) for number, address in enumerate(sorted(addresses, key=_key))}


def _packed(by_pf: Mapping[_Pf, list[PciAddress]], used: Counter[_Pf], missing: int) -> list[PciAddress]:
    chosen: list[PciAddress] = []
    for pf in sorted(by_pf, key=lambda pf: (not used[pf], pf)):
        chosen += by_pf[pf][: missing - len(chosen)]
        if len(chosen) == missing:
            break
    return chosen


def _balanced(by_pf: Mapping[_Pf, list[PciAddress]], used: Counter[_Pf], missing: int) -> list[PciAddress]:
    heap = [(used[pf], pf, 0) for pf in by_pf]
    heapq.heapify(heap)
    chosen: list[PciAddress] = []
    while len(chosen) < missing:
        load, pf, position = heap[0]
        chosen.append(by_pf[pf][position])
        if position + 1 < len(by_pf[pf]):
            heapq.heapreplace(heap, (load + 1, pf, position + 1))
        else:
            heapq.heappop(heap)
    return chosen


def _used(
    available: Sequence[PciAddress], must_include: Sequence[PciAddress], devices: Mapping[PciAddress, Device]
) -> Counter[_Pf]:
    free = set(available)
    used = Counter(_pf(a, devices) for a, device in devices.items() if device.healthy and a not in free)
    used.update(_pf(address, devices) for address in must_include)
    return used


def _check(available: Sequence[PciAddress], must_include: Sequence[PciAddress], size: int) -> None:
    if size < 1:
        raise AllocationError(f"{size} devices were asked for: at least 1 is needed")
    if len(set(available)) != len(available) or len(set(must_include)) != len(must_include):
        raise AllocationError("a device is named twice")
    if size > len(available):
        raise AllocationError(f"{size} devices were asked for, but only {len(available)} are available")
    if len(must_include) > size:
        raise AllocationError(f"{len(must_include)} devices must be included in {size}")
    if not set(must_include) <= set(available):
        raise AllocationError("a device that must be included is not available")


def _pf(address: PciAddress, devices: Mapping[PciAddress, Device]) -> _Pf:
    """The key of a device's PF; where none is known (inside a VM), its bus stands for it."""
    device = devices.get(address)
    if device is None or device.pf is None:
        return (address.domain, address.bus)
    return _key(device.pf)


def _key(address: PciAddress) -> tuple[int, int, int, int]:
    return (address.domain, address.bus, address.device, address.function)
