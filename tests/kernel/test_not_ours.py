"""VFs that are not to be served: on somebody else's driver, or refused by vfio-pci. The others are, meanwhile."""

import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kernel.cases import bind_by_hand
from kernel.nodes import SMALL, VF, VF2
from kernel.real_kernel import modprobe, vfio_unloaded
from kernel.real_node import RealNode, real_node
from kernel.steps import Case
from kernel.test_same_kernel import compare
from kubelet.nodes import CY
from qat_shared.messages import BindDriver, DpdkDriver, Failure, ReleaseDriver
from qat_shared.pci import PciAddress
from qat_simulation.node.description import Node, Pf

GEN2 = Pf(address="0000:e8:00.0", device="37c8", total_vfs=4)
GEN2_VFS = [str(GEN2.vf_address(number)) for number in range(GEN2.total_vfs)]
GEN2_VF = GEN2_VFS[0]
DENIED = Case(
    Node(pfs=(Pf(address=GEN2.address, device="37c8", total_vfs=1),), disable_denylist=False),
    (GEN2_VF,),
    bind_by_hand(GEN2_VF, "c6xxvf", "vfio-pci"),
)
ATTEMPTS = 3


@contextmanager
def standing_still(node: RealNode) -> Iterator[None]:
    """The server, if there is one, does nothing meanwhile."""
    if node.server is None:
        yield
        return
    node.server.send_signal(signal.SIGSTOP)
    found = os.waitid(os.P_PID, node.server.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # until its last thread has
    assert found is not None
    assert found.si_code == os.CLD_STOPPED
    try:
        yield
    finally:
        node.server.send_signal(signal.SIGCONT)


def give(node: RealNode, vf: str, driver: str | None) -> None:
    """As an administrator gives a VF to a driver; None: to whichever takes it.

    In between, no driver has it: the server would bind it at once, and be the first where the machine is slow.
    """
    with standing_still(node):
        node.real.unbind(vf)
        node.real.set_driver_override(vf, driver)
        node.real.probe(vf)


def asked(node: RealNode) -> Counter[str]:
    """How often the present server has asked for each VF to be bound. More than once where that took too long."""
    assert node.server is not None
    return Counter(
        line["arguments"]["address"]
        for line in node.audited("BindDriver")
        if line["event"] == "asked" and line["peer"]["pid"] == node.server.pid
    )


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
            before = asked(node)
            assert set(before) == {VF, "0000:6b:00.3", "0000:6b:00.4"}, "the other never"
            give(node, VF, "pci-stub")
            await node.wait({CY: 2})
            assert await node.kubelet.capacity() == {CY: 3}
            assert (node.real.driver(VF), node.real.driver(VF2)) == ("pci-stub", "pci-stub")
            assert asked(node) == before, "nothing since"
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
            "each was tried often", lambda: all(refused(node)[address] >= ATTEMPTS for address in GEN2_VFS)
        )
        assert sorted(refused(node)) == GEN2_VFS
        assert await node.kubelet.capacity() == {CY: 4}
        registered = [line for line in node.log("server").splitlines() if '"resource registered"' in line]
        assert ["/cy" in line for line in registered] == [True], registered
        await node.until_status(  # the latest reason may be another: that an attempt took too long
            "it says why",
            lambda status: all("disable_denylist=1" in reasons(status.vfs).get(address, "") for address in GEN2_VFS),
        )
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
