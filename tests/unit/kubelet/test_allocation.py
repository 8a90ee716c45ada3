"""Preferred allocation: tables for each policy, refusals, properties; the environment of a container."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_server.kubelet.allocation import AllocationError, AllocationIndex, AllocationPolicy, environment
from qat_server.kubelet.device import Device
from qat_shared.pci import PciAddress
from support.sysfs_tree import address

NONE, PACKED, BALANCED = AllocationPolicy.NONE, AllocationPolicy.PACKED, AllocationPolicy.BALANCED


def ids(*texts: str) -> list[PciAddress]:
    """03:00.0, or 03:00.0-3 for a range of functions; in the given order."""
    found = []
    for text in texts:
        first, _, last = text.partition("-")
        start = int(first[-1])
        found += [address(f"{first[:-1]}{function}") for function in range(start, int(last or start) + 1)]
    return found


def listed(addresses: list[PciAddress], *, pf: bool = False, reason: str = "") -> dict[PciAddress, Device]:
    return {
        at: Device(at, PciAddress(at.domain, at.bus, 0, 0) if pf else None, None, (), (), reason) for at in addresses
    }


def preferred(
    policy: AllocationPolicy,
    available: list[PciAddress],
    must: list[PciAddress],
    size: int,
    devices: dict[PciAddress, Device],
) -> list[PciAddress]:
    """The answer of an index of `devices` to one request, as addresses."""
    chosen = AllocationIndex(devices.values()).preferred(policy, list(map(str, available)), list(map(str, must)), size)
    return [PciAddress.parse(device_id) for device_id in chosen]


FOUR = ids("03:00.0-7", "04:00.0-7", "05:00.0-7", "06:00.0-7")

# policy, available, must include, size, chosen; all of 03..06:00.0-7 are listed, so unavailable devices are in use
CHOICES: dict[str, tuple[AllocationPolicy, list[PciAddress], list[PciAddress], int, list[PciAddress]]] = {
    "none: first in address order": (NONE, ids("06:00.1", "04:00.2", "03:00.7"), [], 2, ids("03:00.7", "04:00.2")),
    "none: must-include first": (NONE, FOUR, ids("06:00.7"), 3, ids("03:00.0-1", "06:00.7")),
    "none: all": (NONE, FOUR, [], 32, FOUR),
    "packed: nothing in use": (PACKED, FOUR, [], 4, ids("03:00.0-3")),
    "packed: more than one PF": (PACKED, FOUR, [], 10, ids("03:00.0-7", "04:00.0-1")),
    "packed: a PF in use": (PACKED, ids("03:00.0-7", "04:00.3-7", "05:00.0-7"), [], 2, ids("04:00.3-4")),
    "packed: the PF in use with the fewest free": (
        PACKED,
        ids("03:00.4-7", "04:00.0-7", "05:00.6-7", "06:00.0-7"),
        [],
        3,
        ids("03:00.4", "05:00.6-7"),
    ),
    "packed: the PF of a must-include device first": (PACKED, FOUR, ids("05:00.3"), 3, ids("05:00.0-1", "05:00.3")),
    "packed: must-include before a PF in use": (
        PACKED,
        ids("03:00.1-7", "04:00.0-7"),
        ids("04:00.0"),
        2,
        ids("04:00.0-1"),
    ),
    "packed: must-include alone": (PACKED, FOUR, ids("05:00.3", "03:00.1"), 2, ids("03:00.1", "05:00.3")),
    "balanced: nothing in use": (BALANCED, FOUR, [], 4, ids("03:00.0", "04:00.0", "05:00.0", "06:00.0")),
    "balanced: more than the PFs": (
        BALANCED,
        FOUR,
        [],
        6,
        ids("03:00.0-1", "04:00.0-1", "05:00.0", "06:00.0"),
    ),
    "balanced: the least used PF": (
        BALANCED,
        ids("03:00.1-7", "04:00.2-7", "05:00.0-7", "06:00.1-7"),
        [],
        1,
        ids("05:00.0"),
    ),
    "balanced: until all are used equally": (
        BALANCED,
        ids("03:00.4-7", "04:00.2-7", "05:00.3-7", "06:00.3-7"),
        [],
        4,
        ids("04:00.2-3", "05:00.3", "06:00.3"),
    ),
    "balanced: must-include counts": (
        BALANCED,
        FOUR,
        ids("03:00.5"),
        4,
        ids("03:00.5", "04:00.0", "05:00.0", "06:00.0"),
    ),
    "balanced: a PF that is otherwise full": (BALANCED, ids("03:00.7", "04:00.0-7"), [], 3, ids("04:00.0-2")),
    "balanced: a PF that has no more devices": (
        BALANCED,
        ids("03:00.6-7", "04:00.7", "05:00.7"),
        [],
        3,
        ids("03:00.6-7", "04:00.7"),
    ),
    "balanced: two must-include devices of one PF": (
        BALANCED,
        ids("03:00.0-7", "04:00.0-7", "05:00.7", "06:00.7"),
        ids("03:00.0-1"),
        5,
        ids("03:00.0-2", "04:00.0-1"),
    ),
}


@pytest.mark.parametrize(("policy", "available", "must", "size", "chosen"), CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("pf", [True, False], ids=["PF known", "in a VM"])
def test_choice(
    policy: AllocationPolicy,
    available: list[PciAddress],
    must: list[PciAddress],
    size: int,
    chosen: list[PciAddress],
    pf: bool,
) -> None:
    devices = listed(FOUR, pf=pf)

    assert preferred(policy, available, must, size, devices) == chosen
    assert preferred(policy, available[::-1], must, size, devices) == chosen, "the order in the request does not matter"


def test_balanced_does_not_count_unhealthy_devices() -> None:
    devices = listed(ids("04:00.0-7"), pf=True) | listed(ids("03:00.0-6"), pf=True, reason="bad")
    devices |= listed(ids("03:00.7"), pf=True)

    assert preferred(BALANCED, ids("03:00.7", "04:00.1-7"), [], 1, devices) == ids("03:00.7")


def test_a_known_pf_counts_and_not_the_bus() -> None:
    first, second = address("03:00.0"), address("03:00.1")
    devices = {
        at: Device(at, pf, None, (), ())
        for at, pf in zip(ids("04:00.0-3"), [second, second, first, first], strict=True)
    }

    assert preferred(PACKED, ids("04:00.1-3"), [], 1, devices) == ids("04:00.1")
    assert preferred(BALANCED, ids("04:00.1-3"), [], 1, devices) == ids("04:00.2")


def test_the_pf_of_an_unlisted_id_is_derived_from_its_address() -> None:
    devices = listed(ids("03:00.0-3"), pf=True)

    assert preferred(BALANCED, ids("03:00.1-3", "04:00.0"), [], 1, devices) == ids("04:00.0")
    assert preferred(PACKED, ids("03:00.1-4", "04:00.0"), [], 4, devices) == ids("03:00.1-4")
    with pytest.raises(AllocationError, match="'banana' is not a PCI address"):
        AllocationIndex(devices.values()).preferred(NONE, ["banana"], [], 1)


REFUSED: dict[str, tuple[list[PciAddress], list[PciAddress], int, str]] = {
    "none": (FOUR, [], 0, "0 devices are requested, but at least 1 is required"),
    "negative": (FOUR, [], -3, "-3 devices are requested, but at least 1 is required"),
    "too many": (ids("03:00.0-2"), [], 4, "4 devices are requested, but only 3 are available"),
    "nothing available": ([], [], 1, "1 devices are requested, but only 0 are available"),
    "fewer than must be included": (
        FOUR,
        ids("03:00.0-2"),
        2,
        "2 devices are requested, fewer than the 3 must-include devices",
    ),
    "must-include not available": (
        ids("03:00.0-2"),
        ids("03:00.1", "05:00.0"),
        2,
        "1 of 2 must-include devices are not among the 3 available: 0000:05:00.0",
    ),
    "available twice": (
        ids("03:00.0", "03:00.1", "03:00.0"),
        [],
        2,
        "device 0000:03:00.0 is listed 2 times among the 3 available devices",
    ),
    "must-include twice": (
        FOUR,
        ids("03:00.1", "03:00.1"),
        2,
        "device 0000:03:00.1 is listed 2 times among the 2 must-include devices",
    ),
}


@pytest.mark.parametrize("policy", AllocationPolicy)
@pytest.mark.parametrize(("available", "must", "size", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(
    policy: AllocationPolicy, available: list[PciAddress], must: list[PciAddress], size: int, sentence: str
) -> None:
    with pytest.raises(AllocationError) as refusal:
        preferred(policy, available, must, size, listed(FOUR))

    assert str(refusal.value) == sentence


_ANY = st.builds(PciAddress, st.sampled_from([0, 1, 0x10000]), st.integers(3, 6), st.integers(0, 2), st.integers(0, 7))


@st.composite
def _requests(draw: st.DrawFn) -> tuple[dict[PciAddress, Device], list[PciAddress], list[PciAddress], int]:
    everything = draw(st.lists(_ANY, unique=True, min_size=1, max_size=40))
    devices = {}
    for at in everything:
        if draw(st.integers(0, 9)):  # one in ten is offered by the kubelet but no longer listed
            pf = draw(st.sampled_from([None, address("03:00.0"), address("04:00.0")]))
            devices[at] = Device(at, pf, None, (), (), draw(st.sampled_from(["", "", "", "bad"])))
    available = draw(st.lists(st.sampled_from(everything), unique=True, min_size=1))
    must = draw(st.lists(st.sampled_from(available), unique=True))
    size = draw(st.integers(max(1, len(must)), len(available)))
    return devices, available, must, size


@given(st.sampled_from(AllocationPolicy), _requests())
def test_any_request(
    policy: AllocationPolicy, request_: tuple[dict[PciAddress, Device], list[PciAddress], list[PciAddress], int]
) -> None:
    devices, available, must, size = request_

    chosen = preferred(policy, available, must, size, devices)

    assert len(chosen) == size, "right size"
    assert set(chosen) <= set(available), "nothing invented"
    assert len(set(chosen)) == len(chosen), "nothing repeated"
    assert set(must) <= set(chosen), "must-include honoured"
    assert chosen == sorted(chosen)
    assert preferred(policy, sorted(available), must[::-1], size, devices) == chosen, "in any order"


@given(st.data())
def test_balanced_never_leaves_a_pf_that_had_less(data: st.DataObject) -> None:
    available = data.draw(st.lists(st.sampled_from(FOUR), unique=True, min_size=1))
    size = data.draw(st.integers(1, len(available)))

    chosen = preferred(BALANCED, available, [], size, listed(FOUR, pf=True))

    left = set(available) - set(chosen)
    load = {bus: sum(at.bus == bus and at not in left for at in FOUR) for bus in range(3, 7)}
    for taken in chosen:
        for spared in left:
            assert load[taken.bus] <= load[spared.bus] + 1


@given(st.data())
def test_packed_leaves_at_most_one_pf_partly_used(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(FOUR)))

    chosen = preferred(PACKED, FOUR, [], size, listed(FOUR, pf=True))

    partly_used = [bus for bus in range(3, 7) if 0 < sum(at.bus == bus for at in chosen) < 8]
    assert len(partly_used) <= 1


ENVIRONMENTS: dict[str, tuple[list[PciAddress], dict[str, str]]] = {
    "nothing": ([], {}),
    "one": (ids("03:00.1"), {"QAT0": "0000:03:00.1"}),
    "address order": (
        ids("04:00.0", "03:00.2", "03:00.1"),
        {"QAT0": "0000:03:00.1", "QAT1": "0000:03:00.2", "QAT2": "0000:04:00.0"},
    ),
    "domains by number": (
        [address("10000:01:00.1"), address("0002:01:00.1"), address("ff:00.1")],
        {"QAT0": "0000:ff:00.1", "QAT1": "0002:01:00.1", "QAT2": "10000:01:00.1"},
    ),
    "more than ten": (
        ids("03:00.0-7", "04:00.0-3"),
        {f"QAT{n}": str(at) for n, at in enumerate(ids("03:00.0-7", "04:00.0-3"))},
    ),
}


@pytest.mark.parametrize(("addresses", "expected"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_environment(addresses: list[PciAddress], expected: dict[str, str]) -> None:
    assert environment(addresses) == expected
    assert list(environment(addresses)) == list(expected)


def test_held_devices_count_even_if_unhealthy_and_unheld_ones_do_not_even_if_unavailable() -> None:
    """03: two held, one of them unhealthy. 04: one held. 05: none held, but not offered (another NUMA node)."""
    devices = [
        Device(address, PciAddress(0, address.bus, 0, 0), 0, (), (), reason="bad" if address == sick else "")
        for sick in ids("03:00.2")
        for address in ids("03:00.1-4", "04:00.1-4", "05:00.1-4")
    ]
    available = list(map(str, ids("03:00.3-4", "04:00.2-4")))
    index = AllocationIndex(devices)
    held = ids("03:00.1-2", "04:00.1")
    assert index.preferred(BALANCED, available, [], 1, held) == ["0000:04:00.2"]
    assert index.preferred(BALANCED, available, [], 1) == ["0000:03:00.3"], "unknown without PodResources"
    assert index.preferred(BALANCED, available, [], 1, [*held, *ids("03:00.3")]) == ["0000:04:00.2"], (
        "offered, so not held"
    )
