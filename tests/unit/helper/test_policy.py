"""The policy: who may request what for which device, and the rules of the device table."""

from functools import partial
from pathlib import Path

import pytest

from qat_helper.errors import OperationError
from qat_helper.operations.table import NAMES, OPERATIONS
from qat_helper.policy import Policy, deny_foreign
from qat_shared.devices import PHYSICAL, VIRTUAL
from qat_shared.messages import (
    DPDK_DRIVERS,
    AnyRequest,
    Hello,
)
from qat_shared.sysfs import MalformedError, SysfsError, open_device
from support.policy_files import BUILTIN, rule_of
from support.sysfs_tree import SysfsTree, address

VF = address("6b:00.1")


def test_every_request_of_the_protocol_has_its_row_and_nothing_else_has() -> None:
    assert set(OPERATIONS) == set(AnyRequest.__args__)
    assert {operation.name for operation in OPERATIONS.values()} == NAMES | {"Hello"}
    assert [kind for kind, operation in OPERATIONS.items() if not operation.max_children] == [Hello]
    assert [operation.name for operation in OPERATIONS.values() if not operation.audited] == [
        "Hello",
        "ReadHeartbeat",
        "ReadDeviceConfig",
    ]


IDS = [
    *((f"8086:{number:04x}", number, 0x8086, kind.driver, "") for number, kind in VIRTUAL.items()),
    *((f"8086:{number:04x}", number, 0x8086, None, "virtual-functions-only") for number in PHYSICAL),
    ("another Intel device", 0x1572, 0x8086, None, "device-table"),
    ("a VF's id of another vendor", 0x4941, 0x1234, None, "device-table"),
    ("a PF's id of another vendor", 0x4940, 0x1234, None, "device-table"),
]


@pytest.mark.parametrize(
    ("number", "vendor", "driver", "rule"), [case[1:] for case in IDS], ids=[case[0] for case in IDS]
)
def test_which_devices_may_be_bound(tmp_path: Path, number: int, vendor: int, driver: str | None, rule: str) -> None:
    tree = SysfsTree(tmp_path / "sys")
    tree.device("6b:00.1", number, vendor=f"0x{vendor:04x}")
    with open_device(tree.root, VF) as device:
        assert rule_of(lambda: BUILTIN.check_virtual(device)) == rule
        if not rule:
            assert BUILTIN.check_virtual(device) == driver


@pytest.mark.parametrize(
    ("number", "rule"), [(0x4940, ""), (0x37C8, ""), (0x4941, "physical-functions-only"), (0x1572, "device-table")]
)
def test_which_devices_may_be_read(tmp_path: Path, number: int, rule: str) -> None:
    tree = SysfsTree(tmp_path / "sys")
    tree.device("6b:00.1", number)
    with open_device(tree.root, VF) as device:
        assert rule_of(lambda: BUILTIN.check_physical(device)) == rule


def test_only_the_listed_ids_are_allowed(tmp_path: Path) -> None:
    policy = Policy(uids=frozenset(), operations=NAMES, device_ids=frozenset({(0x8086, 0x4941), (0x8086, 0x4942)}))
    tree = SysfsTree(tmp_path / "sys")
    found = {}
    for function, number in enumerate((0x4941, 0x4943, 0x4942, 0x4940, 0x1572)):
        tree.device(f"6b:00.{function}", number)
        with open_device(tree.root, address(f"6b:00.{function}")) as device:
            found[number] = (
                rule_of(partial(policy.check_virtual, device)),
                rule_of(partial(policy.check_physical, device)),
            )
    assert found == {
        0x4941: ("", "physical-functions-only"),
        0x4943: ("device_ids", "device_ids"),
        0x4942: ("virtual-functions-only", ""),
        0x4940: ("device_ids", "device_ids"),
        0x1572: ("device-table", "device-table"),
    }


def test_max_vfs() -> None:
    policy = Policy(uids=frozenset(), operations=NAMES, max_vfs=4)
    assert [rule_of(partial(policy.check_vf_count, VF, count)) for count in (0, 4, 5, 16)] == [
        "",
        "",
        "max_vfs",
        "max_vfs",
    ]
    assert rule_of(lambda: BUILTIN.check_vf_count(VF, 256)) == ""
    with pytest.raises(OperationError, match=r"0000:6b:00\.1 would have 16 VFs; .* policy file allows 4 \(max_vfs\)"):
        policy.check_vf_count(VF, 16)


@pytest.mark.parametrize("content", ["", "garbage", "\udc80", "8" * 5000])
def test_a_device_whose_ids_cannot_be_read_is_not_touched(tmp_path: Path, content: str) -> None:
    tree = SysfsTree(tmp_path / "sys")
    tree.device("6b:00.1", 0x4941)
    tree.write("6b:00.1", "device", content.encode(errors="surrogateescape"))
    with open_device(tree.root, VF) as device, pytest.raises(MalformedError):
        BUILTIN.check_virtual(device)
    (tree.path("6b:00.1") / "vendor").unlink()
    with open_device(tree.root, VF) as device, pytest.raises(SysfsError):
        BUILTIN.check_virtual(device)


@pytest.mark.parametrize(
    ("current", "rule"),
    [
        (None, ""),
        ("4xxxvf", ""),
        *((name, "") for name in DPDK_DRIVERS),
        ("c6xxvf", "foreign-driver"),
        ("x", "foreign-driver"),
    ],
)
def test_a_vf_is_taken_only_from_its_own_drivers(current: str | None, rule: str) -> None:
    assert rule_of(lambda: deny_foreign(VF, current, "4xxxvf")) == rule
