"""Without an IOMMU the kernel refuses, and the server says why. And, with a pretend one, another PCI domain."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.cases import bind_by_hand
from kernel.nodes import PF, VF
from kernel.real_kernel import modprobe, vfio_unloaded
from kernel.real_node import InContainer, group_of, real_node
from kernel.steps import Case, Close, Open, Write
from kernel.test_main_job import CLIENT
from kernel.test_same_kernel import compare
from kubelet.nodes import CY, DC, GENERIC
from qat_simulation.node.description import LoneVf, Node, Pf

pytestmark = pytest.mark.guest("no-iommu")

LONE = "0000:a1:00.0"
NOTHING_WORKS = Case(
    Node(pfs=(Pf(address=PF, services="sym;asym", total_vfs=2, num_vfs=0),), vfs=(LoneVf(address=LONE),), iommu=False),
    (PF, VF, LONE),
    (Write(f"{PF}/sriov_numvfs", "2"), *bind_by_hand(LONE, "4xxxvf", "vfio-pci")),
)
TWO_DOMAINS = Node(
    pfs=(
        Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=2, numa_node=0),
        Pf(address="0001:6b:00.0", services="dc", total_vfs=2, numa_node=1),
    )
)


def test_the_kernel_refuses_as_the_emulated_one_does() -> None:
    assert compare(NOTHING_WORKS).steps[0][1] == "EINVAL"


async def test_the_server_says_that_no_vf_can_be_bound() -> None:
    async with real_node(Node(vfs=NOTHING_WORKS.node.vfs)) as node:
        node.start_helper()
        node.start_server()
        status = await node.until_status("the failure shows", lambda status: any(vf.reason for vf in status.vfs))
        assert "IOMMU" in status.vfs[0].reason
        assert node.real.driver(LONE) == "4xxxvf", "it has what it had"


@pytest.fixture
def unsafe() -> Iterator[None]:
    """vfio with its unsafe mode on. Debian builds it without: here it is of the same source, with."""
    ours = Path(__file__).parent / "build/noiommu/vfio.ko"
    with vfio_unloaded():
        subprocess.run(["insmod", os.fspath(ours), "enable_unsafe_noiommu_mode=1"], check=True)
        modprobe("vfio-pci")
        yield


UNSAFE = Case(
    Node(vfs=(LoneVf(address=LONE),), iommu=False, noiommu=True),
    (LONE,),
    (
        *bind_by_hand(LONE, "4xxxvf", "vfio-pci"),
        Open(LONE),
        Close(LONE),
        Write("bus/pci/drivers/vfio-pci/unbind", LONE),
    ),
)


@pytest.mark.usefixtures("unsafe")
def test_in_the_unsafe_mode_the_kernel_does_as_the_emulated_one() -> None:
    compare(UNSAFE)


@pytest.mark.usefixtures("unsafe")
async def test_in_the_unsafe_mode_the_group_without_an_iommu_is_given() -> None:
    async with real_node(UNSAFE.node) as node:
        await node.start({GENERIC: 1})
        await node.until_bound()
        group = f"/dev/vfio/noiommu-{group_of(LONE)}"
        assert Path(group).is_char_device()
        main = (await node.kubelet.allocate("pod", [("main", GENERIC, 1)])).containers["main"]
        assert set(main.device_nodes) == {group, "/dev/vfio/vfio"}
        # The kernel gives it only to who may do raw I/O (CAP_SYS_RAWIO), which the pod would have to ask for.
        without = InContainer(main, *CLIENT)
        with pytest.raises(AssertionError, match="Operation not permitted"):
            await without.line()
        assert await without.end() != 0
        with node.real.open_vfio(LONE):
            await node.until_status("it is in use", lambda status: status.vfs[0].in_use)
        await node.until_status("nobody has it", lambda status: not status.vfs[0].in_use)


def test_debians_kernel_has_neither_that_mode_nor_vfios_character_devices() -> None:
    """When it has, docs/troubleshooting.md has to be looked at again, and this file."""
    config = next((Path(__file__).parent / "build/image/boot").glob("config-*")).read_text()
    assert "# CONFIG_VFIO_NOIOMMU is not set" in config
    assert "CONFIG_VFIO_DEVICE_CDEV=y" not in config
    assert "CONFIG_IOMMUFD=" not in config


async def test_two_pci_domains() -> None:
    async with real_node(TWO_DOMAINS, fake_iommu=True) as node:
        await node.start({CY: 2, DC: 2})
        await node.until_bound()
        pod = await node.kubelet.allocate("pod", [("main", DC, 2)])
        assert set(pod.containers["main"].envs.values()) == {"0001:6b:00.1", "0001:6b:00.2"}
