"""VFs that are not to be served: on somebody else's driver, or refused by vfio-pci. The others are, meanwhile."""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest

from kernel.cases import bind_by_hand
from kernel.nodes import SMALL, VF, VF2
from kernel.real_kernel import modprobe, vfio_unloaded
from kernel.real_node import RealNode, real_node
from kernel.steps import Case
from kernel.test_same_kernel import compare
from kubelet.nodes import CY
from qat_server.simulation.node import Node, Pf
from qat_shared.messages import BindDriver, DpdkDriver, Failure, ReleaseDriver
from qat_shared.pci import PciAddress

GEN2 = Pf(address="0000:e8:00.0", device="37c8", total_vfs=4)
GEN2_VF = str(GEN2.vf_address(0))
DENIED = Case(
    Node(pfs=(Pf(address=GEN2.address, device="37c8", total_vfs=1),), disable_denylist=False),
    (GEN2_VF,),
    bind_by_hand(GEN2_VF, "c6xxvf", "vfio-pci"),
)
ATTEMPTS = 3


def give(node: RealNode, vf: str, driver: str | None) -> None:
    """As an administrator gives a VF to a driver; None: to whichever takes it."""
    node.real.unbind(vf)
    node.real.set_driver_override(vf, driver)
    node.real.probe(vf)


async def test_a_vf_on_somebody_elses_driver_is_left_alone() -> None:
    modprobe("pci-stub")
    try:
        async with real_node(SMALL, ("--resync-interval=200ms",)) as node:
            give(node, VF2, "pci-stub")
            await node.start({CY: 3})
            await node.until_status("it says why", lambda status: reasons(status.vfs).get(VF2, "").endswith("pci-stub"))
            with node.ask() as client:
                for request in (
                    BindDriver(id=1, address=PciAddress.parse(VF2), driver=DpdkDriver.VFIO_PCI),
                    ReleaseDriver(id=2, address=PciAddress.parse(VF2)),
                ):
                    reply = client.ask(request)
                    assert isinstance(reply, Failure), reply
                    assert reply.rule == "foreign-driver"
            # Taken from us while a pod has it: it stays on the list, unhealthy, and is not taken back.
            pod = await node.kubelet.allocate("pod", [("main", CY, 3)])
            assert VF in pod.containers["main"].envs.values()
            give(node, VF, "pci-stub")
            await node.wait({CY: 2})
            assert await node.kubelet.capacity() == {CY: 3}
            assert (node.real.driver(VF), node.real.driver(VF2)) == ("pci-stub", "pci-stub")
            assert node.server is not None
            asked = Counter(
                line["arguments"]["address"]
                for line in node.audited("BindDriver")
                if line["event"] == "asked" and line["peer"]["pid"] == node.server.pid
            )
            assert asked == {VF: 1, "0000:6b:00.3": 1, "0000:6b:00.4": 1}, "each once, and this one never"
            said = [line for line in node.log("server").splitlines() if "left alone" in line]
            assert [VF2 in line for line in said] == [True, False], said
            # Given back, both are served.
            give(node, VF, None)
            give(node, VF2, None)
            await node.wait({CY: 4})
            await node.until_bound()
    finally:
        modprobe("-r", "pci-stub")


def reasons(vfs: object) -> dict[str, str]:
    assert isinstance(vfs, tuple)
    return {vf.address: vf.reason for vf in vfs}


@pytest.fixture
def denying() -> Iterator[None]:
    """vfio-pci as it is without a parameter: it refuses VFs of devices before Gen4."""
    with vfio_unloaded():
        modprobe("vfio-pci")
        modprobe("vfio_iommu_type1")
        yield


@pytest.mark.usefixtures("denying")
def test_vfio_pci_refuses_as_the_emulated_one_does() -> None:
    assert compare(DENIED).steps[-1][2][GEN2_VF].get("driver") is None


@pytest.mark.usefixtures("denying")
async def test_what_vfio_pci_refuses_is_on_no_list_however_often_it_is_tried() -> None:
    options = ("--resync-interval=200ms", "--kernel-vf-drivers=4xxxvf,c6xxvf")
    async with real_node(Node(pfs=(*SMALL.pfs, GEN2)), options) as node:
        await node.start({CY: 4})
        await node.until(
            "each was tried often", lambda: [*refused(node).values()] and min(refused(node).values()) >= ATTEMPTS
        )
        assert sorted(refused(node)) == [str(GEN2.vf_address(number)) for number in range(GEN2.total_vfs)]
        assert await node.kubelet.capacity() == {CY: 4}
        registered = [line for line in node.log("server").splitlines() if '"resource registered"' in line]
        assert ["/cy" in line for line in registered] == [True], registered
        said = reasons((await node.status()).vfs)
        assert ["disable_denylist=1" in said[address] for address in refused(node)] == [True] * GEN2.total_vfs
        lines = [line for line in node.log("server").splitlines() if '"VF not bound"' in line]
        for number in range(GEN2.total_vfs):
            told = [line.partition("why=")[2] for line in lines if f'"{GEN2.vf_address(number)}"' in line]
            assert all(before != after for before, after in itertools.pairwise(told)), ("said again, unchanged", lines)
        await node.stop_server()
        await node.until(
            "they have the driver that they had",
            lambda: {node.real.driver(GEN2.vf_address(number)) for number in range(GEN2.total_vfs)} == {"c6xxvf"},
        )


def refused(node: RealNode) -> Counter[str]:
    """How often each VF's binding has ended in a refusal of the kernel's."""
    ended = [line for line in node.audited("BindDriver") if line["event"] == "done" and line["verdict"] != "ok"]
    return Counter(line["arguments"]["address"] for line in ended)
