"""The demo's decisions that need no node: the outcome for each VF, and which lines of the audit log belong together."""

from typing import Any

import pytest

from qat_server.helper_client.client import HelperState
from qat_server.observability.status_format import Status, VfStatus
from qat_shared.pci import PciAddress
from qat_simulation.demo.audit import _lines, examples
from qat_simulation.demo.vf_outcomes import VfOutcomes, outcomes
from qat_simulation.kernel.kernel import DeviceState
from qat_simulation.node.description import LoneVf, Node, Pf

PF, VF, VF2 = "0000:6b:00.0", "0000:6b:00.1", "0000:6b:00.2"
ALONE = "0000:00:05.0"
NODE = Node(pfs=(Pf(address=PF, total_vfs=2),))


def status(*vfs: VfStatus, cut: tuple[str, ...] = ()) -> Status:
    return Status("0", True, (), HelperState(), (), vfs, (), (), cut)


def told(address: str, driver: str = "vfio-pci", listed: bool = True, reason: str = "") -> VfStatus:
    return VfStatus(address, "4941", PF, driver, 0, "cy", listed, reason, None, "")


def devices(pf_driver: str | None = "4xxx") -> dict[PciAddress, DeviceState]:
    pf = PciAddress.parse(PF)
    made = {pf: DeviceState(pf_driver, None, None, 0, False)}
    return made | {PciAddress.parse(vf): DeviceState(None, None, pf, 1, False) for vf in (VF, VF2)}


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (status(told(VF), told(VF2, reason="PF is down")), VfOutcomes(served=(VF, VF2))),
        (status(told(VF)), VfOutcomes(served=(VF,), pending=(VF2,))),
        (status(told(VF), told(VF2, listed=False)), VfOutcomes(served=(VF,), pending=(VF2,))),
        (status(told(VF), told(VF2, "4xxxvf", False)), VfOutcomes(served=(VF,), pending=(VF2,))),
        (status(told(VF), told(VF2, "", False, "refused")), VfOutcomes(served=(VF,), failed={VF2: "refused"})),
        (
            status(told(VF), told(VF2, "pci-stub", False, "left alone")),
            VfOutcomes(served=(VF,), other_driver={VF2: "pci-stub"}),
        ),
        (status(told(VF), cut=(VF2,)), VfOutcomes(served=(VF,), over_limit=(VF2,))),
    ],
    ids=[
        "served, healthy or not",
        "not in the status yet",
        "not listed yet",
        "not bound yet",
        "failed",
        "on another driver",
        "over the limit",
    ],
)
def test_each_vf_is_in_one_group(seen: Status, expected: VfOutcomes) -> None:
    groups = outcomes(seen, NODE, devices())
    assert groups == expected
    assert groups.total == 2


def test_vfs_of_a_pf_without_its_driver_are_ignored_unless_no_pf_has_it() -> None:
    both = Node(pfs=NODE.pfs, vfs=(LoneVf(address=ALONE),))
    alone = {PciAddress.parse(ALONE): DeviceState("4xxxvf", None, None, 9, False)}
    with_pf = outcomes(status(told(VF), told(VF2)), both, devices() | alone)
    assert with_pf.ignored == (ALONE,)
    without = outcomes(status(), both, devices(pf_driver=None) | alone)
    assert without.pending == (VF, VF2, ALONE)


def test_a_reason_is_reported_once() -> None:
    groups = VfOutcomes(failed={VF: f"{VF} was refused", VF2: f"{VF2} was refused", ALONE: "it is busy"})
    assert groups.failures() == [f"2 VFs ({VF} .. {VF2}): the VF was refused", f"{ALONE}: it is busy"]


def record(sequence: int, event: str, operation: str = "", asked: int = 0) -> dict[str, Any]:
    return {"sequence": sequence, "event": event, "operation": operation, "asked": asked}


def test_one_line_is_counted_in_the_singular() -> None:
    assert [_lines("the helper's start", number) for number in (1, 2)] == [
        "1 more line of the helper's start",
        "2 more lines of the helper's start",
    ]


def test_an_operation_is_shown_with_its_own_result_in_the_log_s_order() -> None:
    log = [
        record(1, "start"),
        record(2, "asked", "BindDriver"),
        record(3, "asked", "BindDriver"),
        record(4, "asked", "SetNumVfs"),
        record(5, "done", "BindDriver", 3),
        record(6, "done", "SetNumVfs", 4),
        record(7, "done", "BindDriver", 2),
        record(8, "start"),
    ]
    shown, more = examples(log)
    assert [each["sequence"] for each in shown] == [1, 2, 4, 6, 7]
    assert more == {"BindDriver": 2, "the helper's start": 1}
