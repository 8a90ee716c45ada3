"""The listing: device nodes, when a device stays or leaves, shared IOMMU groups, changed resources."""

from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from qat_server.devices.inventory import Inventory, Problem, VirtualFunction
from qat_server.kubelet.device import Device, Holder, Listing
from qat_server.kubelet.listing import next_listing, refusals
from qat_shared.messages import DpdkDriver
from qat_shared.pci import PciAddress
from support.sysfs_tree import address

PF, VF, OTHER = address("6b:00.0"), address("6b:00.1"), address("6b:00.2")
VFIO, UIO = DpdkDriver.VFIO_PCI, DpdkDriver.IGB_UIO


def virtual(
    where: PciAddress = VF,
    driver: str | None = "vfio-pci",
    group: int | None = 12,
    noiommu: bool = False,
    uio: str | None = None,
) -> VirtualFunction:
    return VirtualFunction(where, 0x4941, driver, PF, 1, group, noiommu=noiommu, uio=uio, in_use=None)


def inventory(*vfs: VirtualFunction, cut: tuple[PciAddress, ...] = (), problems: tuple[Problem, ...] = ()) -> Inventory:
    return Inventory((), vfs, cut, problems)


def device(where: PciAddress = VF, group: int = 12, reason: str = "") -> Device:
    return Device(where, PF, 1, (f"/dev/vfio/{group}", "/dev/vfio/vfio"), (), reason)


Holders = Mapping[str, Mapping[PciAddress, Holder]]


class Pods(Struct):
    """A PodDevices made of two functions of resource and device."""

    releasable: Callable[[str, PciAddress], bool]
    may_be_held: Callable[[str, PciAddress], bool]
    holders: Holders | None = None


def step(
    previous: Listing,
    found: Inventory,
    name: str | None = "cy",
    releasable: bool = False,
    driver: DpdkDriver = VFIO,
    unhealthy: dict[PciAddress, str] | None = None,
) -> Listing:
    names = {vf.address: name for vf in found.vfs} if name else {}
    pods = Pods(lambda *_: releasable, lambda *_: not releasable)
    return next_listing(previous, found, names, unhealthy or {}, driver, pods)


NODES: dict[str, tuple[VirtualFunction, DpdkDriver, tuple[str, ...], tuple[str, ...]]] = {
    "vfio": (virtual(), VFIO, ("/dev/vfio/12", "/dev/vfio/vfio"), ()),
    "vfio without IOMMU": (virtual(noiommu=True), VFIO, ("/dev/vfio/noiommu-12", "/dev/vfio/vfio"), ()),
    "igb_uio": (
        virtual(driver="igb_uio", uio="uio3", group=None),
        UIO,
        ("/dev/uio3",),
        ("/sys/class/uio/uio3/device",),
    ),
}


@pytest.mark.parametrize(("vf", "driver", "nodes", "mounts"), NODES.values(), ids=NODES)
def test_nodes(vf: VirtualFunction, driver: DpdkDriver, nodes: tuple[str, ...], mounts: tuple[str, ...]) -> None:
    assert step({}, inventory(vf), driver=driver) == {"cy": (Device(VF, PF, 1, nodes, mounts),)}


LISTED: Listing = {"cy": (device(),)}

# the inventory, the resource's name, the driver, and the reason why a device that was listed before is unhealthy
NOT_SERVED: dict[str, tuple[Inventory, str | None, DpdkDriver, str]] = {
    "gone": (inventory(), "cy", VFIO, "it is gone"),
    "malformed": (inventory(problems=(Problem(VF, "vendor: empty"),)), "cy", VFIO, "vendor: empty"),
    "cut": (inventory(cut=(VF,)), "cy", VFIO, "it exceeds the maximum number of devices"),
    "unbound": (inventory(virtual(driver=None)), "cy", VFIO, "it has no driver"),
    "on the kernel's driver": (
        inventory(virtual(driver="4xxxvf")),
        "cy",
        VFIO,
        "it is on driver 4xxxvf, not on vfio-pci",
    ),
    "on the other DPDK driver": (inventory(virtual()), "cy", UIO, "it is on driver vfio-pci, not on igb_uio"),
    "no IOMMU group": (inventory(virtual(group=None)), "cy", VFIO, "it has no IOMMU group"),
    "no uio device": (inventory(virtual(driver="igb_uio")), "cy", UIO, "it has no uio device"),
    "services not known": (inventory(virtual()), None, VFIO, "its PF's services are not known"),
}


@pytest.mark.parametrize(("found", "name", "driver", "reason"), NOT_SERVED.values(), ids=NOT_SERVED)
def test_not_served(found: Inventory, name: str | None, driver: DpdkDriver, reason: str) -> None:
    assert step({}, found, name, driver=driver) == {}, "never listed: absent"
    kept = step(LISTED, found, name, driver=driver)
    assert kept == {"cy": (device(reason=reason),)}, "listed: unhealthy, with its last nodes"
    assert step(kept, found, name, driver=driver) == kept
    assert step(kept, found, name, releasable=True, driver=driver) == {}, "no pod can hold it: the resource ends"
    assert step(kept, inventory(virtual())) == LISTED, "it recovered"


def test_devices_are_in_address_order_and_come_back_with_new_nodes() -> None:
    both = step({}, inventory(virtual(), virtual(OTHER, group=13)))
    assert both == {"cy": (device(), device(OTHER, 13))}
    gone = step(both, inventory(virtual(OTHER, group=13)))
    assert gone == {"cy": (device(reason="it is gone"), device(OTHER, 13))}
    assert step(gone, inventory(virtual(group=20), virtual(OTHER, group=13)))["cy"][0] == device(group=20)


def test_an_unhealthy_pf_makes_its_vfs_unhealthy_and_recovers() -> None:
    sick = step(LISTED, inventory(virtual()), unhealthy={PF: "no heartbeat"})
    assert sick == {"cy": (device(reason="no heartbeat"),)}
    assert step({}, inventory(virtual()), unhealthy={PF: "no heartbeat"}) == sick, "listed nevertheless"
    assert step(sick, inventory(virtual()), unhealthy={address("70:00.0"): "no heartbeat"}) == LISTED


def test_a_changed_resource() -> None:
    moved = step(LISTED, inventory(virtual()), "dc")
    assert moved == {
        "cy": (device(reason="it is now served as dc"),),
        "dc": (device(reason="a pod may hold it as cy"),),
    }
    assert step(moved, inventory(virtual()), "dc") == moved
    assert step(moved, inventory(virtual()), "dc", releasable=True) == {"dc": (device(),)}
    assert step(moved, inventory(virtual()), "cy") == {
        "cy": (device(reason="a pod may hold it as dc"),),
        "dc": (device(reason="it is now served as cy"),),
    }


def test_a_held_device_is_listed_even_if_this_server_has_never_seen_it() -> None:
    held = {"cy": {VF: Holder("default/pod/main", 1)}, "somebody-elses": {VF: Holder("default/other/main")}}

    def first(found: Inventory, name: str) -> Listing:
        names = {vf.address: name for vf in found.vfs}
        return next_listing({}, found, names, {}, VFIO, Pods(lambda *_: False, lambda *_: True, held))

    assert first(inventory(), "cy") == {"cy": (Device(VF, None, 1, (), (), "it is gone"),)}
    assert first(inventory(virtual()), "cy") == LISTED
    assert first(inventory(virtual(driver=None)), "cy")["cy"][0].reason == "it has no driver"
    assert first(inventory(virtual()), "dc") == {
        "cy": (Device(VF, None, 1, (), (), "it is now served as dc"),),
        "dc": (device(reason="a pod may hold it as cy"),),
    }


def test_in_a_changed_resource_a_device_that_no_pod_holds_is_healthy_at_once() -> None:
    def move(*holders: tuple[str, PciAddress]) -> Listing:
        pods = Pods(lambda *_: False, lambda *key: key in holders)
        return next_listing(LISTED, inventory(virtual()), {VF: "dc"}, {}, VFIO, pods)

    assert move()["dc"] == (device(),)
    assert move(("dc", VF), ("cy", OTHER))["dc"] == (device(),)
    assert move(("cy", VF))["dc"] == (device(reason="a pod may hold it as cy"),)
    assert move()["cy"] == move(("cy", VF))["cy"] == (device(reason="it is now served as dc"),)


SHARED = "it shares IOMMU group 12 with 0000:6b:00.1, and a group can have only one user"


def test_one_vf_of_a_shared_group_is_served() -> None:
    both = inventory(virtual(), virtual(OTHER))

    assert step({}, both) == LISTED
    assert refusals(both, VFIO) == {OTHER: SHARED}
    assert step({"cy": (device(), device(OTHER))}, both) == {"cy": (device(), device(OTHER, reason=SHARED))}
    assert step({"cy": (device(OTHER),)}, both) == {"cy": (device(OTHER),)}, (
        "the VF that is already listed keeps the group"
    )


def test_a_group_with_a_device_on_another_driver_cannot_be_used() -> None:
    why = "it shares IOMMU group 12 with 0000:6b:00.2, which is on driver 4xxxvf"
    assert step(LISTED, inventory(virtual(), virtual(OTHER, "4xxxvf"))) == {"cy": (device(reason=why),)}
    assert step(LISTED, inventory(virtual(), virtual(OTHER, None))) == LISTED, "VFIO allows those without a driver"


# Random sequences of states of a few VFs.

_ADDRESSES = tuple(address(f"6b:00.{function}") for function in range(1, 5))
_VF = st.builds(
    virtual,
    driver=st.sampled_from([None, "vfio-pci", "vfio-pci", "vfio-pci", "igb_uio"]),
    group=st.sampled_from([None, 1, 2, 3, 4, 5]),
)
_WORLDS = st.tuples(
    st.dictionaries(st.sampled_from(_ADDRESSES), _VF),
    st.fixed_dictionaries({where: st.sampled_from(["cy", "dc", "generic"]) for where in _ADDRESSES}),
    st.booleans(),
    st.sets(st.tuples(st.sampled_from(["cy", "dc", "generic"]), st.sampled_from(_ADDRESSES))),
    st.none() | st.sets(st.tuples(st.sampled_from(["cy", "dc", "generic"]), st.sampled_from(_ADDRESSES))),
)


@given(st.lists(_WORLDS, max_size=8))
def test_any_sequence_of_changes(
    worlds: list[
        tuple[
            dict[PciAddress, VirtualFunction],
            dict[PciAddress, str],
            bool,
            set[tuple[str, PciAddress]],
            set[tuple[str, PciAddress]] | None,
        ]
    ],
) -> None:
    listing: Listing = {}
    for vfs, names, sick, free, holders in worlds:
        # Without PodResources, every device that is not releasable may be held.
        pods = Pods(
            lambda *key: key in free,  # noqa: B023 - called in this round only
            lambda *key: key not in free and (holders is None or key in holders),  # noqa: B023
        )
        found = inventory(*(virtual(at, vfs[at].driver, vfs[at].iommu_group) for at in sorted(vfs)))

        def forward(before: Listing) -> Listing:
            return next_listing(
                before,
                found,  # noqa: B023 - called in this round only
                names,  # noqa: B023
                {PF: "no heartbeat"} if sick else {},  # noqa: B023
                VFIO,
                pods,  # noqa: B023
            )

        after = forward(listing)
        healthy = [device for devices in after.values() for device in devices if device.healthy]
        assert len({device.address for device in healthy}) == len(healthy), "healthy twice"
        assert len({device.nodes[0] for device in healthy}) == len(healthy), "one group in two devices"
        listed = {(name, device.address) for name, devices in listing.items() for device in devices}
        still = {(name, device.address) for name, devices in after.items() for device in devices}
        assert listed - still <= free, "a device that may be in use was removed"
        assert all(after.values())
        for devices in after.values():
            order = [device.address for device in devices]
            assert order == sorted(set(order))
        assert not (sick and healthy)
        assert forward(after) == after, "idempotent"
        listing = after
