"""The operations on PFs, step by step, on the emulated kernel; and a failure after each step."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from qat_helper.dispatch import perform
from qat_helper.operations import writing
from qat_helper.operations.node import Node
from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy
from qat_shared.messages import (
    AnyReply,
    AnyRequest,
    ErrorCode,
    Failure,
    Provisioned,
    Service,
    SetAutoReset,
    SetNumVfs,
    SetPmIdle,
    SetServices,
)
from qat_shared.pci import PciAddress
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node import description as simulated
from support.emulated_kernel import PF, VF, VF2, Writes, attribute, emulated, read

GEN2, OLD, OTHER = "0001:3d:00.0", "0000:70:00.0", "0000:00:07.0"
NODE = simulated.Node(
    pfs=(
        simulated.Pf(address=PF, services="dc", total_vfs=2),
        simulated.Pf(address=GEN2, device="37c8", total_vfs=2),
        simulated.Pf(address=OLD, device="0435", total_vfs=2),
    ),
    others=(simulated.OtherDevice(address=OTHER, vendor="8086", device="1572"),),
)
STATE, SERVICES, IDLE = f"{PF}/qat/state", f"{PF}/qat/cfg_services", f"{PF}/qat/pm_idle_enabled"
AUTOPROBE, NUM_VFS = f"{PF}/sriov_drivers_autoprobe", f"{PF}/sriov_numvfs"


class Bench:
    """A node, and the writes to it."""

    def __init__(self, kernel: Kernel, writes: Writes) -> None:
        self.kernel = kernel
        self.writes = writes
        self.node = Node(
            sysfs_root=kernel.sysfs_root,
            kubelet_dir=Path("/none"),
            server_gid=0,
            policy=Policy(uids=frozenset(), operations=NAMES),
        )

    def ask(self, request: AnyRequest) -> AnyReply:
        return perform(self.node, request).reply

    def services(self, services: str = "sym;asym", pf: str = PF) -> AnyReply:
        return self.ask(SetServices(id=1, address=at(pf), services=tuple(map(Service, services.split(";")))))

    def vfs(self, count: int, pf: str = PF) -> AnyReply:
        return self.ask(SetNumVfs(id=1, address=at(pf), count=count))

    def shows(self, name: str, pf: str = PF) -> str:
        return read(self.kernel, attribute(pf, name)).strip()

    def number(self) -> int:
        return sum(str(state.pf) == PF for state in self.kernel.snapshot().values())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with emulated(NODE) as kernel:
        writes = Writes(kernel)
        monkeypatch.setattr(writing, "os", writes)
        yield Bench(kernel, writes)


def at(text: str) -> PciAddress:
    return PciAddress.parse(text)


def changed(reply: AnyReply) -> tuple[str, str]:
    assert isinstance(reply, Provisioned), reply
    return reply.before, reply.now


def failed(reply: AnyReply, code: ErrorCode, number: int = 0, rule: str = "") -> str:
    assert isinstance(reply, Failure), reply
    assert (reply.code, reply.errno, reply.rule) == (code, number, rule)
    return reply.message


def test_services_down_write_up(bench: Bench) -> None:
    assert changed(bench.services("asym;sym")) == ("dc", "asym;sym")
    # In this order: kernels before 6.4 accept no other.
    assert bench.writes.seen == [(STATE, "down"), (SERVICES, "sym;asym"), (STATE, "up")]
    assert (bench.shows("qat/state"), bench.number()) == ("up", 0)


def test_unchanged_services_remove_no_vfs(bench: Bench) -> None:
    bench.services()
    bench.vfs(2)
    bench.writes.seen.clear()
    with bench.kernel.open_vfio(on_vfio(bench, VF)):
        assert changed(bench.services()) == ("asym;sym", "asym;sym")
    assert bench.writes.seen == []


def test_the_same_services_bring_up_a_device_that_was_left_down(bench: Bench) -> None:
    bench.kernel.set_state(PF, "down")
    assert changed(bench.services("dc")) == ("dc", "dc")
    assert bench.shows("qat/state") == "up"


@pytest.mark.parametrize("services", ["sym;asym;dc", "dcc;sym", "decomp"])
def test_services_that_the_kernel_rejects_leave_the_old_ones(bench: Bench, services: str) -> None:
    message = failed(bench.services(services), ErrorCode.KERNEL, errno.EINVAL)
    assert "the kernel refused to write" in message
    assert (bench.shows("qat/state"), bench.shows("qat/cfg_services")) == ("up", "dc")


@pytest.mark.parametrize(
    ("step", "number", "seen", "end"),
    [
        ("qat/state", errno.EBUSY, [(STATE, "down")], ("up", "dc", 2)),
        ("qat/cfg_services", errno.EINVAL, [(SERVICES, "dc"), (STATE, "up")], ("up", "dc", 0)),
        ("qat/cfg_services", errno.ENOMEM, [(SERVICES, "dc"), (STATE, "up")], ("up", "dc", 0)),
    ],
)
def test_a_step_that_fails_is_undone(
    bench: Bench, step: str, number: int, seen: list[tuple[str, str]], end: tuple[str, str, int]
) -> None:
    bench.kernel.fail_next(PF, step, number)
    failed(bench.services(), ErrorCode.KERNEL, number)
    assert bench.writes.seen[-len(seen) :] == seen
    assert (bench.shows("qat/state"), bench.shows("qat/cfg_services"), bench.number()) == end


def test_services_with_which_the_pf_does_not_come_up_are_restored(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.writes.write
    refused = []

    def write(descriptor: int, data: bytes) -> int:
        if (
            data == b"up" and bench.shows("qat/cfg_services") != "dc"
        ):  # as before kernel 6.16, which rejects it only now
            refused.append(data)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data)

    monkeypatch.setattr(bench.writes, "write", write)
    failed(bench.services(), ErrorCode.KERNEL, errno.EINVAL)
    assert len(refused) == 1
    assert (bench.shows("qat/state"), bench.shows("qat/cfg_services")) == ("up", "dc")


def test_an_undo_that_also_fails_is_reported(bench: Bench) -> None:
    bench.kernel.fail_next(PF, "qat/cfg_services", errno.EIO, times=2)
    message = failed(bench.services(), ErrorCode.KERNEL, errno.EIO)
    assert message.count("Input/output error") == 2
    assert bench.shows("qat/state") == "up", "the undo continues with its next step"


def on_vfio(bench: Bench, vf: str) -> str:
    bench.kernel.set_driver_override(vf, "vfio-pci")
    if bench.kernel.driver(vf) is not None:
        bench.kernel.unbind(vf)
    bench.kernel.probe(vf)
    assert bench.kernel.driver(vf) == "vfio-pci"
    return vf


@pytest.mark.parametrize("vf", [VF, VF2])
def test_nothing_is_written_while_any_vf_is_open(bench: Bench, vf: str) -> None:
    for each in (VF, VF2):
        on_vfio(bench, each)
    pm_idle = SetPmIdle(id=1, address=at(PF), on=False)
    with bench.kernel.open_vfio(vf):
        for reply in (bench.services(), bench.vfs(0), bench.ask(pm_idle)):
            assert failed(reply, ErrorCode.BUSY).startswith(f"{vf}, a VF of {PF}, is in use")
        assert bench.writes.seen == []
        assert changed(bench.ask(SetAutoReset(id=1, address=at(PF), on=True))) == ("off", "on"), "removes no VFs"
    assert changed(bench.services()) == ("dc", "asym;sym")


def test_a_vf_whose_unbind_is_blocked_counts_as_open(bench: Bench) -> None:
    """As a child of a killed helper leaves it, blocked in the kernel: no driver link, but enabled."""
    bench.kernel.unbind(VF)
    (bench.kernel.sysfs_root / attribute(VF, "enable")).write_text("1\n")
    failed(bench.services(), ErrorCode.BUSY)
    assert bench.writes.seen == []


def test_vfs_on_a_foreign_driver_are_not_removed(bench: Bench) -> None:
    bench.kernel.add_driver("somebody")
    bench.kernel.unbind(VF2)
    bench.kernel.set_driver_override(VF2, "somebody")
    bench.kernel.probe(VF2)
    failed(bench.services(), ErrorCode.DENIED, rule="foreign-driver")
    failed(bench.vfs(0), ErrorCode.DENIED, rule="foreign-driver")
    assert bench.writes.seen == []


def test_vfs_are_enabled_without_the_kernels_driver_and_removed(bench: Bench) -> None:
    assert changed(bench.vfs(0)) == ("2", "0")
    assert bench.writes.seen == [(AUTOPROBE, "1"), (NUM_VFS, "0")]
    bench.writes.seen.clear()
    assert changed(bench.vfs(1)) == ("0", "2"), "the QAT driver enables all"
    assert bench.writes.seen == [(AUTOPROBE, "0"), (NUM_VFS, "1")]
    assert [bench.kernel.driver(vf) for vf in (VF, VF2)] == [None, None]
    bench.writes.seen.clear()
    assert changed(bench.vfs(2)) == ("2", "2")
    assert bench.writes.seen == []


def test_the_number_of_vfs_is_within_what_the_device_can_have(bench: Bench) -> None:
    failed(bench.vfs(3), ErrorCode.DENIED, rule="vf-count")
    assert bench.writes.seen == []


@pytest.mark.parametrize(("most", "denied"), [(0, True), (1, True), (2, False)])
def test_max_vfs_limits_the_resulting_vfs_not_the_requested_ones(bench: Bench, most: int, denied: bool) -> None:
    assert changed(bench.vfs(0)) == ("2", "0")
    bench.node = msgspec.structs.replace(bench.node, policy=msgspec.structs.replace(bench.node.policy, max_vfs=most))
    bench.writes.seen.clear()
    if denied:
        failed(bench.vfs(1), ErrorCode.DENIED, rule="max_vfs")
        assert bench.writes.seen == []
    else:
        assert changed(bench.vfs(1)) == ("0", "2")
    assert changed(bench.vfs(0))[1] == "0", "removing them is always allowed"


def test_vfs_without_an_iommu() -> None:
    node = simulated.Node(pfs=(simulated.Pf(address=PF, services="dc", total_vfs=2, num_vfs=0),), iommu=False)
    with emulated(node) as kernel, pytest.MonkeyPatch.context() as patch:
        writes = Writes(kernel)
        patch.setattr(writing, "os", writes)
        failed(Bench(kernel, writes).vfs(2), ErrorCode.KERNEL, errno.EINVAL)


def test_a_device_that_is_down_gets_its_vfs_and_is_up(bench: Bench) -> None:
    bench.kernel.set_state(PF, "down")
    assert changed(bench.vfs(2)) == ("0", "2")
    assert bench.shows("qat/state") == "up"


def test_pm_idle(bench: Bench) -> None:
    assert changed(bench.ask(SetPmIdle(id=1, address=at(PF), on=False))) == ("1", "0")
    assert bench.writes.seen == [(STATE, "down"), (IDLE, "0"), (STATE, "up")]
    assert changed(bench.ask(SetPmIdle(id=1, address=at(PF), on=False))) == ("0", "0")
    assert len(bench.writes.seen) == 3
    assert changed(bench.ask(SetPmIdle(id=1, address=at(PF), on=False, stay_down=True))) == ("0", "0")
    assert bench.shows("qat/state") == "down"


def test_auto_reset(bench: Bench) -> None:
    request = SetAutoReset(id=1, address=at(PF), on=True)
    assert changed(bench.ask(request)) == ("off", "on")
    assert changed(bench.ask(request)) == ("on", "on")
    assert bench.writes.seen == [(f"{PF}/qat/auto_reset", "on")]


def test_a_c62x_has_vfs_and_no_services(bench: Bench) -> None:
    assert "has no qat/cfg_services" in failed(bench.services(pf=GEN2), ErrorCode.UNAVAILABLE)
    assert "has no qat/auto_reset" in failed(
        bench.ask(SetAutoReset(id=1, address=at(GEN2), on=True)), ErrorCode.UNAVAILABLE
    )
    assert changed(bench.vfs(0, GEN2)) == ("2", "0")
    assert changed(bench.vfs(2, GEN2)) == ("0", "2")


@pytest.mark.parametrize(
    ("address", "rule"),
    [(VF, "physical-functions-only"), (OLD, "not-provisioned"), (OTHER, "device-table")],
    ids=["VF", "PF that is only read", "another device"],
)
def test_only_pfs_that_are_provisioned(bench: Bench, address: str, rule: str) -> None:
    requests: tuple[AnyRequest, ...] = (
        SetServices(id=1, address=at(address), services=(Service.DC,)),
        SetPmIdle(id=1, address=at(address), on=True),
        SetAutoReset(id=1, address=at(address), on=True),
        SetNumVfs(id=1, address=at(address), count=0),
    )
    for request in requests:
        failed(bench.ask(request), ErrorCode.DENIED, rule=rule)
    assert bench.writes.seen == []


def test_a_pf_without_its_driver_is_left_alone(bench: Bench) -> None:
    bench.kernel.unbind(PF)
    assert "is not bound to 4xxx" in failed(bench.vfs(2), ErrorCode.UNAVAILABLE)
    assert "No such file" in failed(bench.vfs(2, "0000:ff:00.0"), ErrorCode.VANISHED)


def test_a_pf_that_is_removed_during_the_operation(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.writes.write

    def write(descriptor: int, data: bytes) -> int:
        if data == b"sym;asym":
            bench.kernel.unplug(PF)
        return real(descriptor, data)

    monkeypatch.setattr(bench.writes, "write", write)
    reply = bench.services()
    assert isinstance(reply, Failure)
    assert (reply.code, reply.message) == (ErrorCode.VANISHED, f"{PF} was removed during the operation")


def test_a_write_without_effect_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.writes, "write", lambda descriptor, data: len(data))
    assert "shows 'dc' after" in failed(bench.services(), ErrorCode.KERNEL)
    assert "shows 'off' after" in failed(bench.ask(SetAutoReset(id=1, address=at(PF), on=True)), ErrorCode.KERNEL)
    assert "has 2 VFs" in failed(bench.vfs(0), ErrorCode.KERNEL)
