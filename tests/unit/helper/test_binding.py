"""BindDriver and ReleaseDriver, step by step, on the emulated kernel."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat_helper.dispatch import perform
from qat_helper.operations import binding, writing
from qat_helper.operations.node import Node
from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy
from qat_shared.messages import AnyReply, BindDriver, Bound, DpdkDriver, ErrorCode, Failure, ReleaseDriver
from qat_shared.pci import PciAddress
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node import description as simulated
from support.emulated_kernel import PF, VF, VF2, Writes, attribute, emulated, read

ONE_PF = simulated.Node(
    pfs=(simulated.Pf(address=PF, device="4940", services="dc", total_vfs=2),),
    vfs=(simulated.LoneVf(address="0000:00:05.0", device="37c9"),),
    others=(simulated.OtherDevice(address="0000:00:07.0", vendor="8086", device="1572"),),
)


class Bench:
    """A node, and the writes to it."""

    def __init__(self, kernel: Kernel, writes: Writes) -> None:
        self.kernel = kernel
        self.writes = writes
        policy = Policy(uids=frozenset(), operations=NAMES)
        self.node = Node(sysfs_root=kernel.sysfs_root, kubelet_dir=Path("/none"), server_gid=0, policy=policy)

    def bind(self, address: str = VF, driver: str = "vfio-pci") -> AnyReply:
        request = BindDriver(id=1, address=PciAddress.parse(address), driver=DpdkDriver(driver))
        return perform(self.node, request).reply

    def release(self, address: str = VF) -> AnyReply:
        return perform(self.node, ReleaseDriver(id=1, address=PciAddress.parse(address))).reply

    def override(self, address: str = VF) -> str:
        return read(self.kernel, attribute(address, "driver_override")).strip()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with emulated(ONE_PF) as kernel:
        writes = Writes(kernel)
        monkeypatch.setattr(writing, "os", writes)
        yield Bench(kernel, writes)


def failed(reply: AnyReply, code: ErrorCode, rule: str = "", number: int = 0) -> str:
    """The message of a Failure, after checking its kind."""
    assert isinstance(reply, Failure)
    assert (reply.code, reply.rule, reply.errno) == (code, rule, number)
    return reply.message


def bound(reply: AnyReply) -> tuple[str | None, bool]:
    assert isinstance(reply, Bound)
    return reply.driver, reply.changed


def test_a_vf_is_taken_from_its_kernel_driver(bench: Bench) -> None:
    assert bound(bench.bind()) == ("vfio-pci", True)
    assert bench.kernel.driver(VF) == "vfio-pci"
    assert bench.writes.seen == [
        (f"{VF}/driver_override", "vfio-pci"),
        ("bus/pci/drivers/4xxxvf/unbind", VF),
        ("bus/pci/drivers_probe", VF),
    ]
    assert bench.kernel.driver(VF2) == "4xxxvf", "no other VF changes"


def test_a_vf_that_is_bound_already_is_not_written_to(bench: Bench) -> None:
    bench.bind()
    bench.writes.seen.clear()
    assert bound(bench.bind()) == ("vfio-pci", False)
    assert bench.writes.seen == []


def test_a_vf_without_a_driver_is_bound_without_unbind(bench: Bench) -> None:
    bench.kernel.unbind(VF)
    assert bound(bench.bind(driver="igb_uio")) == ("igb_uio", True)
    assert [name for name, _ in bench.writes.seen] == [f"{VF}/driver_override", "bus/pci/drivers_probe"]


def test_from_one_dpdk_driver_to_the_other_and_back(bench: Bench) -> None:
    for driver in ("igb_uio", "vfio-pci", "igb_uio"):
        assert bound(bench.bind(driver=driver)) == (driver, True)


def test_an_open_vf_is_busy_and_not_written_to(bench: Bench) -> None:
    bench.bind()
    bench.writes.seen.clear()
    with bench.kernel.open_vfio(VF):
        assert "in use through vfio-pci" in failed(bench.bind(driver="igb_uio"), ErrorCode.BUSY)
        assert "in use through vfio-pci" in failed(bench.release(), ErrorCode.BUSY)
        assert bound(bench.bind()) == ("vfio-pci", False), "nothing needs to change"
    assert bench.writes.seen == []
    assert bound(bench.bind(driver="igb_uio")) == ("igb_uio", True)


@pytest.mark.parametrize(
    ("address", "rule"),
    [(PF, "virtual-functions-only"), ("0000:00:07.0", "device-table")],
    ids=["PF", "another device"],
)
def test_only_vfs_of_the_table(bench: Bench, address: str, rule: str) -> None:
    failed(bench.bind(address), ErrorCode.DENIED, rule)
    failed(bench.release(address), ErrorCode.DENIED, rule)
    assert bench.writes.seen == []


def test_a_vf_on_somebody_elses_driver_is_left_alone(bench: Bench) -> None:
    bench.kernel.add_driver("pci-stub")
    bench.kernel.unbind(VF)
    bench.kernel.set_driver_override(VF, "pci-stub")
    bench.kernel.probe(VF)
    assert "pci-stub" in failed(bench.bind(), ErrorCode.DENIED, "foreign-driver")
    failed(bench.release(), ErrorCode.DENIED, "foreign-driver")
    assert bench.writes.seen == []


def test_a_missing_device_has_vanished(bench: Bench) -> None:
    failed(bench.bind("0001:6b:00.1"), ErrorCode.VANISHED)
    failed(bench.release("0000:6b:1f.7"), ErrorCode.VANISHED)


def test_a_driver_that_is_not_loaded_is_named(bench: Bench) -> None:
    bench.kernel.remove_driver("vfio-pci")
    assert "modprobe vfio-pci" in failed(bench.bind(), ErrorCode.UNAVAILABLE)
    assert bench.writes.seen == []


@pytest.mark.parametrize("step", ["driver_override", "unbind", "drivers_probe"])
def test_a_refused_write_is_reported_and_undone(bench: Bench, step: str) -> None:
    bench.kernel.fail_next(None, step, errno.EBUSY)
    assert "the kernel refused to" in failed(bench.bind(), ErrorCode.KERNEL, number=errno.EBUSY)
    assert bench.kernel.driver(VF) == "4xxxvf"
    assert bench.override() == "(null)"
    assert bound(bench.bind()) == ("vfio-pci", True), "and the next attempt succeeds"


def test_a_probe_that_fails_silently_is_detected_and_undone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "SETTLE", 0.05)
    bench.kernel.fail_next(VF, "probe", errno.EINVAL)
    assert "dmesg" in failed(bench.bind(), ErrorCode.KERNEL)
    assert bench.kernel.driver(VF) == "4xxxvf"
    assert bench.override() == "(null)"


def test_the_message_names_disable_denylist_for_devices_on_the_deny_list(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "SETTLE", 0.05)
    bench.kernel.fail_next("0000:00:05.0", "probe", errno.EINVAL)
    assert "disable_denylist=1" in failed(bench.bind("0000:00:05.0"), ErrorCode.KERNEL)


def test_the_old_override_is_restored(bench: Bench) -> None:
    bench.bind(driver="igb_uio")
    bench.kernel.fail_next(VF, "unbind", errno.EIO)
    failed(bench.bind(), ErrorCode.KERNEL, number=errno.EIO)
    assert (bench.override(), bench.kernel.driver(VF)) == ("igb_uio", "igb_uio")


def test_an_undo_that_also_fails_is_reported(bench: Bench) -> None:
    bench.kernel.fail_next(None, "drivers_probe", errno.EIO, times=2)
    message = failed(bench.bind(), ErrorCode.KERNEL, number=errno.EIO)
    assert message.count("the kernel refused to probe it") == 2


def test_a_device_removed_between_two_writes_has_vanished(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, data: bytes) -> int:
        bench.kernel.unplug(VF)
        raise OSError(errno.ENODEV, "gone")

    monkeypatch.setattr(bench.writes, "write", write)
    assert "was removed" in failed(bench.bind(), ErrorCode.VANISHED, number=errno.ENODEV)


def test_a_short_write_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.writes, "write", lambda descriptor, data: 1)
    failed(bench.bind(), ErrorCode.KERNEL, number=errno.EIO)


def test_release_gives_the_vf_back_to_the_kernels_choice(bench: Bench) -> None:
    bench.bind()
    assert bound(bench.release()) == ("4xxxvf", True)
    assert bench.override() == "(null)"
    bench.writes.seen.clear()
    assert bound(bench.release()) == ("4xxxvf", False)
    assert bench.writes.seen == []


def test_release_where_no_kernel_driver_is_loaded(bench: Bench) -> None:
    bench.bind()
    bench.kernel.remove_driver("4xxxvf")
    assert bound(bench.release()) == (None, True)


def test_a_release_that_fails_is_undone(bench: Bench) -> None:
    bench.bind()
    bench.kernel.fail_next(VF, "unbind", errno.EIO)
    failed(bench.release(), ErrorCode.KERNEL, number=errno.EIO)
    assert (bench.override(), bench.kernel.driver(VF)) == ("vfio-pci", "vfio-pci")


def test_a_link_in_place_of_an_attribute_is_not_followed(bench: Bench) -> None:
    target = bench.kernel.sysfs_root / "elsewhere"
    target.write_text("(null)")
    file = bench.kernel.sysfs_root / attribute(VF, "driver_override")
    content = file.read_bytes()
    file.unlink()
    file.symlink_to(target)
    failed(bench.bind(), ErrorCode.KERNEL, number=errno.ELOOP)
    assert target.read_text() == "(null)"
    file.unlink()
    file.write_bytes(content)


def test_a_foreign_override_is_left_alone(bench: Bench) -> None:
    bench.kernel.unbind(VF)
    bench.kernel.set_driver_override(VF, "xen-pciback")
    for reply in (bench.bind(), bench.release()):
        assert "driver_override" in failed(reply, ErrorCode.DENIED, "foreign-driver")
    assert bench.override() == "xen-pciback"
    assert bench.kernel.driver(VF) is None


def test_nothing_is_created(bench: Bench) -> None:
    (bench.kernel.sysfs_root / "bus/pci/drivers_probe").unlink()
    failed(bench.bind(), ErrorCode.KERNEL, number=errno.ENOENT)
    assert not (bench.kernel.sysfs_root / "bus/pci/drivers_probe").exists()
