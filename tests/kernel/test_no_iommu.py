"""Without an IOMMU the kernel refuses, and the server says why. And, with a pretend one, another PCI domain."""

import pytest

from emulated import emulated
from kernel.cases import bind_by_hand
from kernel.nodes import PF, VF
from kernel.real_kernel import real_kernel
from kernel.real_node import real_node
from kernel.steps import Case, Write, differences, emulated_uevents, kernel_uevents, observe
from kubelet.nodes import CY, DC
from qat_server.simulation.node import LoneVf, Node, Pf

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
    case = NOTHING_WORKS
    with emulated(case.node) as kernel, emulated_uevents(kernel, case.watched[0]) as uevents:
        ours = observe(kernel, case, uevents)
    with kernel_uevents() as uevents, real_kernel(case.node) as real:
        theirs = observe(real, case, uevents)
    assert theirs.steps[0][1] == "EINVAL"
    if found := differences(ours, theirs):
        pytest.fail("\n".join(found), pytrace=False)


async def test_the_server_says_that_no_vf_can_be_bound() -> None:
    async with real_node(Node(vfs=NOTHING_WORKS.node.vfs)) as node:
        node.start_helper()
        node.start_server()
        status = await node.until_status("the failure shows", lambda status: any(vf.reason for vf in status.vfs))
        assert "IOMMU" in status.vfs[0].reason
        assert node.real.driver(LONE) == "4xxxvf", "it has what it had"


async def test_two_pci_domains() -> None:
    async with real_node(TWO_DOMAINS, fake_iommu=True) as node:
        await node.start({CY: 2, DC: 2})
        await node.until_bound()
        pod = await node.kubelet.allocate("pod", [("main", DC, 2)])
        assert set(pod.containers["main"].envs.values()) == {"0001:6b:00.1", "0001:6b:00.2"}
