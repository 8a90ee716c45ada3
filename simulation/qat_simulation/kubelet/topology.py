"""NUMA hints: made as by the kubelet's device manager, merged as by its topology manager. Pure.

Follows pkg/kubelet/cm/devicemanager/topology_hints.go and topologymanager/policy*.go (v1.36), scope "container". Two
hints that are not preferred are compared by width alone.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from msgspec import Struct


class TopologyPolicy(StrEnum):
    """The kubelet's --topology-manager-policy."""

    NONE = "none"
    BEST_EFFORT = "best-effort"
    RESTRICTED = "restricted"
    SINGLE_NUMA_NODE = "single-numa-node"


class Hint(Struct, frozen=True):
    """A set of NUMA nodes that is sufficient (None: any), and whether no smaller set could ever be."""

    nodes: frozenset[int] | None
    preferred: bool


Topology = Mapping[str, frozenset[int]]
"""Device id to its NUMA nodes, empty for none."""


def hints(devices: Topology, available: Iterable[str], wanted: int, machine: Sequence[int]) -> list[Hint]:
    """The sets of NUMA nodes that hold `wanted` of `available`; `devices` are all, `machine` the node's NUMA nodes."""
    with_devices = sorted(frozenset(machine) & frozenset(node for nodes in devices.values() for node in nodes))
    considered = with_devices or list(machine)
    free = list(available)
    narrowest = len(considered)
    found = []
    for mask in _masks(considered):
        if len(mask) < narrowest and sum(bool(nodes & mask) for nodes in devices.values()) >= wanted:
            narrowest = len(mask)
        if sum(bool(devices[device] & mask) for device in free) >= wanted:
            found.append(mask)
    return [Hint(mask, len(mask) == narrowest) for mask in found]


def merge(policy: TopologyPolicy, offered: Sequence[list[Hint] | None], machine: Sequence[int]) -> tuple[Hint, bool]:
    """The hint for a container, and whether it is admitted. `offered` is by resource: None for no preference."""
    if policy is TopologyPolicy.NONE:
        return Hint(None, True), True
    everywhere = frozenset(machine)
    choices = [_choices(hints, policy) for hints in offered]
    best: Hint | None = None
    for permutation in itertools.product(*choices):
        candidate = _merged(permutation, everywhere)
        if candidate.nodes and (best is None or _better(candidate, best)):
            best = candidate
    result = best or Hint(everywhere, False)
    if policy is TopologyPolicy.SINGLE_NUMA_NODE and result.nodes == everywhere:
        result = Hint(None, result.preferred)
    return result, policy is TopologyPolicy.BEST_EFFORT or result.preferred


def _choices(hints: list[Hint] | None, policy: TopologyPolicy) -> list[Hint]:
    if hints is None:
        return [Hint(None, True)]
    if policy is TopologyPolicy.SINGLE_NUMA_NODE:
        hints = [hint for hint in hints if hint.preferred and (hint.nodes is None or len(hint.nodes) == 1)]
    return hints or [Hint(None, False)]


def _merged(permutation: Sequence[Hint], everywhere: frozenset[int]) -> Hint:
    affinities = [hint.nodes for hint in permutation if hint.nodes is not None]
    preferred = all(hint.preferred for hint in permutation) and len(set(affinities)) <= 1
    return Hint(everywhere.intersection(*affinities), preferred)


def _better(candidate: Hint, current: Hint) -> bool:
    if candidate.preferred != current.preferred:
        return candidate.preferred
    ours, theirs = candidate.nodes or frozenset(), current.nodes or frozenset()
    return (len(ours), sorted(ours)) < (len(theirs), sorted(theirs))


def _masks(nodes: Sequence[int]) -> Iterable[frozenset[int]]:
    for size in range(1, len(nodes) + 1):
        for mask in itertools.combinations(nodes, size):
            yield frozenset(mask)
