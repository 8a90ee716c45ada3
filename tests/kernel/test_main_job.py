"""The main job on the real kernel: start to allocatable, and clients in containers that have what Allocate gave."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel.nodes import IN_A_VM, TWO_PFS, TWO_SMALL, UIO
from kernel.real_node import InContainer, group_of, real_node
from kubelet.nodes import CY, GENERIC
from qat_server.kubelet.registration.directories import Registration
from qat_shared.messages import BindDriver, DpdkDriver, Failure
from qat_shared.pci import PciAddress

CLIENT = (sys.executable, "-I", str(Path(__file__).with_name("vfio_client.py")))


async def test_32_vfs_are_bound_and_allocatable(record_property: Callable[[str, object], None]) -> None:
    async with real_node(TWO_PFS) as node:
        seconds = await node.start({CY: 32})
        status = await node.until_bound()
        assert {vf.driver for vf in status.vfs} == {"vfio-pci"}
        for vf in status.vfs:
            assert Path(f"/dev/vfio/{group_of(vf.address)}").is_char_device()
        assert len({group_of(vf.address) for vf in status.vfs}) == 32
        record_property("measured", f"server's start to 32 VFs bound and allocatable in the kubelet: {seconds:.1f} s")


@pytest.mark.parametrize("registration", Registration)
async def test_a_client_opens_what_it_was_given_and_nothing_else(registration: Registration) -> None:
    async with real_node(TWO_SMALL, ("--allocation-policy=balanced",), registration=registration) as node:
        await node.start({CY: 4})
        await node.until_bound()
        pod = await node.kubelet.allocate("pod", [("main", CY, 2)])
        main = pod.containers["main"]
        addresses = list(main.envs.values())
        groups = sorted(map(group_of, addresses))
        assert set(main.device_nodes) == {"/dev/vfio/vfio", *(f"/dev/vfio/{group}" for group in groups)}
        client = InContainer(main, *CLIENT)
        seen = await client.line()
        assert seen["devices"] == {
            address: {"group": group_of(address), "viable": True, "regions": 9, "config_size": 4096, "id": "8086:4941"}
            for address in addresses
        }
        assert seen["type1v2"] == 1
        assert seen["mapped"] == 64 * 1024
        assert seen["dev"] == ["fd", "null", "random", "urandom", "vfio", "zero"]
        assert seen["vfio"] == sorted(["vfio", *map(str, groups)])
        assert (seen["uid"], int(seen["capabilities"], 16)) == (0, 0)
        assert {name: text for name, text in seen["environment"].items() if name.startswith("QAT")} == main.envs
        # The kernel says who is in use, to anybody: the server shows it.
        await node.until_status("two in use", lambda status: [vf.in_use for vf in status.vfs].count(True) == 2)
        # Another VF's group is not there for it, and a second user does not get in.
        other = next(vf.address for vf in (await node.status()).vfs if vf.address not in addresses)
        stranger = InContainer(main, *CLIENT, other)
        with pytest.raises(AssertionError, match="FileNotFoundError"):
            await stranger.line()
        assert await stranger.end() != 0
        second = InContainer(main, *CLIENT)
        with pytest.raises(AssertionError, match="resource busy"):
            await second.line()
        assert await second.end() != 0
        assert await client.end() == 0
        await node.until_status("none in use", lambda status: not any(vf.in_use for vf in status.vfs))


async def test_igb_uio_gives_uio_nodes_and_the_mount() -> None:
    async with real_node(UIO, ("-dpdk-driver", "igb_uio")) as node:
        await node.start({CY: 4})
        await node.until_status("bound", lambda status: all(vf.driver == "igb_uio" for vf in status.vfs))
        main = (await node.kubelet.allocate("pod", [("main", CY, 1)])).containers["main"]
        (path,) = main.device_nodes
        assert path.startswith("/dev/uio")
        assert Path(path).is_char_device()
        (mount,) = main.mounts
        assert mount == f"/sys/class/uio/{Path(path).name}/device"
        assert Path(mount).resolve().name == main.envs["QAT0"]


async def test_inside_a_vm_vfs_without_pf_are_served_and_a_foreign_device_is_left_alone() -> None:
    foreign = IN_A_VM.others[0].address
    async with real_node(IN_A_VM) as node:
        before = node.real.snapshot()
        await node.start({GENERIC: 3})
        status = await node.until_bound()
        assert [vf.pf for vf in status.vfs] == ["", "", ""]
        after = node.real.snapshot()
        (untouched,) = [address for address in after if after[address] == before[address]]
        assert str(untouched) == foreign
        main = (await node.kubelet.allocate("pod", [("main", GENERIC, 3)])).containers["main"]
        client = InContainer(main, *CLIENT)
        assert set((await client.line())["devices"]) == {vf.address for vf in IN_A_VM.vfs}
        assert await client.end() == 0
        with node.ask() as asked:
            reply = asked.ask(BindDriver(id=1, address=PciAddress.parse(foreign), driver=DpdkDriver.VFIO_PCI))
            assert isinstance(reply, Failure)
            assert reply.rule == "device-table"
