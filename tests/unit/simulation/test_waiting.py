"""Operations that wait in the emulated kernel, and the effect of faults on writes. No process is involved."""

import errno
import time
from collections.abc import Iterator

import pytest

from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import Node, Pf
from support.conditions import wait_until
from support.emulated_kernel import PF, VF, VF2, attribute, background, emulated, read, real
from support.mixed_node import DRV, MIXED, NUMVFS, OFF, OVERRIDE, STATE, TO_VFIO


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with emulated(MIXED) as made:
        yield made


def in_use(kernel: Kernel) -> str:
    return read(kernel, attribute(VF, "enable")) + read(kernel, attribute(VF, "power/runtime_status"))


@pytest.fixture
def vfio() -> Iterator[Kernel]:
    with emulated(Node(pfs=(Pf(address=PF, total_vfs=4, vf_driver="vfio-pci"),))) as made:
        yield made


def test_enable_shows_whether_a_vfio_device_is_open(vfio: Kernel) -> None:
    assert in_use(vfio) == "0\nsuspended\n"
    handle = vfio.open_vfio(VF)
    assert in_use(vfio) == "1\nactive\n"
    with pytest.raises(OSError, match="busy"):
        vfio.open_vfio(VF)
    with pytest.raises(OSError, match="Resource temporarily unavailable"):
        vfio.remove_driver("vfio-pci")
    handle.close()
    handle()
    assert in_use(vfio) == "0\nsuspended\n"


def test_only_vfio_devices_can_be_opened(kernel: Kernel) -> None:
    with pytest.raises(OSError, match="No such device"):
        kernel.open_vfio(VF)


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("bus/pci/drivers/vfio-pci/unbind", VF),
        (NUMVFS, "0"),
        (STATE, "down"),
        ("bus/pci/drivers/4xxx/unbind", PF),
        (real(PF, "remove"), "1"),
    ],
    ids=["unbind", "numvfs", "down", "PF unbind", "PF remove"],
)
def test_release_waits_until_the_device_is_closed(vfio: Kernel, path: str, data: str) -> None:
    handle = vfio.open_vfio(VF)
    writer = background(lambda: vfio.write(path, data))
    wait_until(lambda: vfio.driver(VF) is None)  # the link is removed at once
    assert read(vfio, attribute(VF, "enable")) == "1\n"
    vfio.unbind(VF2)  # no other operation is blocked
    vfio.probe(VF)  # it still counts as bound: nothing happens
    other = background(lambda: vfio.write(OVERRIDE, "x"))  # needs the device's lock
    assert writer.is_alive()
    assert other.is_alive()
    handle.close()
    for thread in (writer, other):
        thread.join(120)
        assert not thread.is_alive()


def test_waiting_writes_end_with_the_kernel() -> None:
    with emulated(Node(pfs=(Pf(address=PF, total_vfs=1, vf_driver="vfio-pci"),))) as kernel:
        kernel.open_vfio(VF)
        errors: list[int | None] = []

        def write() -> None:
            try:
                kernel.unbind(VF)
            except OSError as error:
                errors.append(error.errno)

        thread = background(write)
        wait_until(lambda: kernel.driver(VF) is None)
    thread.join(120)
    assert errors == [errno.ESHUTDOWN]


# Faults


def test_next_write_fails_and_changes_nothing(kernel: Kernel) -> None:
    kernel.fail_next(VF, "driver_override", errno.ENOMEM, times=2)
    for _ in range(2):
        with pytest.raises(OSError, match="Cannot allocate memory"):
            kernel.write(*TO_VFIO)
    kernel.write(real(VF2, "driver_override"), "vfio-pci")
    kernel.write(*TO_VFIO)


def test_faults_match_the_device_written_to_bus_wide_files(kernel: Kernel) -> None:
    kernel.fail_next(VF, "unbind", errno.EIO)
    kernel.fail_next(None, "state", errno.EBUSY)
    kernel.write(f"{DRV}/4xxxvf/unbind", VF2)
    with pytest.raises(OSError, match="Input/output error"):
        kernel.write(*OFF)
    with pytest.raises(OSError, match="busy"):
        kernel.write(STATE, "down")


def test_driver_that_does_not_accept_the_device(kernel: Kernel) -> None:
    kernel.unbind(VF)
    kernel.fail_next(VF, "probe", errno.EIO, times=2)
    kernel.write("bus/pci/drivers_probe", VF)
    assert kernel.driver(VF) is None
    with pytest.raises(OSError, match="Input/output error"):
        kernel.write(f"{DRV}/4xxxvf/bind", VF)
    kernel.write("bus/pci/drivers_probe", VF)
    assert kernel.driver(VF) == "4xxxvf"


def test_hanging_write_blocks_no_other(kernel: Kernel) -> None:
    kernel.hang("unbind", VF)
    writer = background(lambda: kernel.write(*OFF))
    kernel.write(f"{DRV}/4xxxvf/unbind", VF2)
    assert writer.is_alive()
    assert kernel.driver(VF) == "4xxxvf"
    kernel.release("unbind", VF)
    writer.join(120)
    assert kernel.driver(VF) is None


def test_delayed_write(kernel: Kernel) -> None:
    kernel.delay("unbind", 0.05)
    began = time.monotonic()
    kernel.write(*OFF)
    assert time.monotonic() - began >= 0.05
    assert kernel.driver(VF) is None
    kernel.delay("unbind", 0)
    assert kernel._faults._faults == []
