"""The real helper process on the emulated kernel: what happens to one VF does not happen to the others."""

import errno
from collections.abc import Iterator

import pytest

from qat_shared.messages import Bound, ErrorCode, Failure, ReleaseDriver
from qat_shared.pci import PciAddress
from qat_simulation.node.description import Node, Pf
from support.conditions import wait_until
from support.emulated_kernel import PF, VF, VF2
from support.helper_on_emulated_kernel import Running, code, helper_on

ONE_PF = Node(pfs=(Pf(address=PF, device="4940", services="dc", total_vfs=2),))


@pytest.fixture
def running() -> Iterator[Running]:
    with helper_on(ONE_PF) as running:
        yield running


def test_bound_and_given_back(running: Running) -> None:
    reply = running.client.ask(running.bind(VF))
    assert isinstance(reply, Bound)
    assert (reply.driver, reply.changed) == ("vfio-pci", True)
    assert running.kernel.driver(VF) == "vfio-pci"
    with running.kernel.open_vfio(VF):
        assert code(running.client.ask(ReleaseDriver(id=2, address=PciAddress.parse(VF)))) is ErrorCode.BUSY
    released = running.client.ask(ReleaseDriver(id=3, address=PciAddress.parse(VF)))
    assert isinstance(released, Bound)
    assert released.driver == "4xxxvf"
    assert running.kernel.driver(VF2) == "4xxxvf"


def test_a_refused_write_is_undone(running: Running) -> None:
    running.kernel.fail_next(None, "drivers_probe", errno.EIO)
    reply = running.client.ask(running.bind(VF))
    assert code(reply) is ErrorCode.KERNEL
    assert isinstance(reply, Failure)
    assert reply.errno == errno.EIO
    assert running.kernel.driver(VF) == "4xxxvf"


def test_an_unbind_that_blocks_holds_up_that_vf_only(running: Running) -> None:
    running.kernel.hang("unbind")
    client = running.client
    client.send(running.bind(VF, 1))
    wait_until(lambda: running.story()[-1:] == [("asked", "", VF)])
    assert code(client.ask(running.bind(VF, 2))) is ErrorCode.BUSY
    running.kernel.set_driver_override(VF2, "igb_uio")
    heard = client.ask(ReleaseDriver(id=3, address=PciAddress.parse(VF2)))
    assert isinstance(heard, Bound), "another VF is served meanwhile"
    late = client.receive()
    assert (late.id, code(late)) == (1, ErrorCode.TIMED_OUT)
    assert code(client.ask(running.bind(VF, 4))) is ErrorCode.BUSY, "its child is still at work, and is left alone"
    running.kernel.release("unbind")
    wait_until(lambda: ("late", "late", VF) in running.story())
    reply = client.ask(running.bind(VF, 5))
    assert isinstance(reply, Bound)
    assert (reply.driver, reply.changed) == ("vfio-pci", False), "it came to pass after all"
