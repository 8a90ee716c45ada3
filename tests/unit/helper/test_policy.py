"""The policy: who may request what for which device, and what a policy file can change."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qat_helper.errors import OperationError
from qat_helper.operations.table import NAMES, OPERATIONS
from qat_helper.policy import BUILTIN_RATES, Policy, PolicyError, Rate, deny_foreign, narrow
from qat_shared.devices import PHYSICAL, VIRTUAL
from qat_shared.messages import (
    DPDK_DRIVERS,
    AnyRequest,
    BindDriver,
    DpdkDriver,
    ErrorCode,
    Hello,
    PrepareSocketDirectory,
    SocketDirectory,
)
from qat_shared.pci import PciAddress
from qat_shared.sysfs import MalformedError, SysfsError, open_device
from support.sysfs_tree import SysfsTree, address

BUILTIN = Policy(uids=frozenset({65532}), operations=NAMES)
VF = address("6b:00.1")


def rule_of(check: Callable[[], object]) -> str:
    """The rule of the denial, "" when nothing is denied."""
    try:
        check()
    except OperationError as error:
        assert error.code is ErrorCode.DENIED
        assert error.message
        return error.rule
    return ""


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


def test_extra_physical_ids_may_be_provisioned_but_not_bound(tmp_path: Path) -> None:
    policy = Policy(uids=frozenset(), operations=NAMES, extra_physical_ids=frozenset({(0x8086, 0x10C9)}))
    tree = SysfsTree(tmp_path / "sys")
    tree.device("6b:00.1", 0x10C9)
    with open_device(tree.root, VF) as device:
        assert policy.check_physical(device) == ""
        assert rule_of(lambda: policy.check_virtual(device)) == "device-table"


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


def test_extra_ids_may_be_bound_but_not_read(tmp_path: Path) -> None:
    policy = Policy(uids=frozenset(), operations=NAMES, extra_virtual_ids=frozenset({(0x8086, 0x10CA)}))
    tree = SysfsTree(tmp_path / "sys")
    tree.device("6b:00.1", 0x10CA)
    with open_device(tree.root, VF) as device:
        assert policy.check_virtual(device) is None
        assert rule_of(lambda: policy.check_physical(device)) == "device-table"


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


def policy_file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "policy.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o644)
    return path


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert narrow(BUILTIN, policy_file(tmp_path, ""), os.geteuid()) == BUILTIN


def test_a_full_file_narrows_and_each_denial_names_its_rule(tmp_path: Path) -> None:
    text = """
        server_uids = [1000]
        operations = ["BindDriver"]
        addresses = ["0000:6b:00.1", "10000:e1:00.1"]
        drivers = ["igb_uio"]
        directories = ["plugins-registry"]
        device_ids = ["8086:4941"]
        max_vfs = 8
        extra_virtual_ids = ["8086:10ca", "1af4:1041"]
        extra_physical_ids = ["8086:10c9"]
        [rates]
        all = { burst = 100, per_second = 2 }
        BindDriver = { burst = 10, per_second = 0.5 }
    """
    policy = narrow(BUILTIN, policy_file(tmp_path, text), os.geteuid())
    assert policy.uids == {65532, 1000}
    assert policy.extra_virtual_ids == {(0x8086, 0x10CA), (0x1AF4, 0x1041)}
    assert policy.extra_physical_ids == {(0x8086, 0x10C9)}
    assert (policy.device_ids, policy.max_vfs) == (frozenset({(0x8086, 0x4941)}), 8)
    given = {"all": Rate(burst=100, per_second=2), "BindDriver": Rate(burst=10, per_second=0.5)}
    assert policy.rates == {**BUILTIN_RATES, **given}
    assert rule_of(lambda: policy.check_operation("BindDriver")) == ""
    assert rule_of(lambda: policy.check_operation("ReadHeartbeat")) == "operations"

    def prepare(directory: SocketDirectory) -> str:
        request = PrepareSocketDirectory(id=1, directory=directory)
        return rule_of(lambda: OPERATIONS[PrepareSocketDirectory].rule(policy, request))

    assert prepare(SocketDirectory.PLUGINS_REGISTRY) == ""
    assert prepare(SocketDirectory.DEVICE_PLUGINS) == "directories"

    def bind(where: PciAddress, driver: DpdkDriver) -> str:
        request = BindDriver(id=1, address=where, driver=driver)
        return rule_of(lambda: OPERATIONS[BindDriver].rule(policy, request))

    assert bind(VF, DpdkDriver.IGB_UIO) == ""
    assert bind(address("10000:e1:00.1"), DpdkDriver.IGB_UIO) == ""
    assert bind(VF, DpdkDriver.VFIO_PCI) == "drivers"
    assert bind(address("6b:00.2"), DpdkDriver.IGB_UIO) == "addresses"


UNUSABLE = {
    "no TOML": ("= nonsense", "policy.toml"),
    "not UTF-8": (b"\xff\xfe", "policy.toml"),
    "unknown key": ("allow_everything = true", "allow_everything"),
    "wrong type": ('drivers = "vfio-pci"', "drivers"),
    "unknown driver": ('drivers = ["e1000"]', "drivers"),
    "unknown directory": ('directories = ["plugins_registry"]', "directories"),
    "unknown operation": ('operations = ["Reboot"]', "Reboot is not an operation"),
    "Hello cannot be forbidden": ('operations = ["Hello"]', "Hello is not an operation"),
    "no address": ('addresses = ["6b:00.1"]', "addresses"),
    "no id": ('extra_virtual_ids = ["8086"]', "extra_virtual_ids"),
    "a PF's id": ('extra_virtual_ids = ["8086:4940"]', "8086:4940 is a QAT device - at `$.extra_virtual_ids`"),
    "a VF's id": ('extra_physical_ids = ["8086:4941"]', "8086:4941 is a QAT device - at `$.extra_physical_ids`"),
    "an id that is not QAT's": ('device_ids = ["8086:10ca"]', "8086:10ca is not a QAT device - at `$.device_ids`"),
    "a negative number of VFs": ("max_vfs = -1", "max_vfs"),
    "a limit of no operation": (
        "rates.Reboot = { burst = 1, per_second = 1 }",
        "Reboot is not an operation - at `$.rates`",
    ),
    "a limit of Hello": ("rates.Hello = { burst = 1, per_second = 1 }", "Hello is not an operation"),
    "half a limit": ("rates.BindDriver = { burst = 1 }", "per_second"),
    "a limit that lets nothing pass": ("rates.BindDriver = { burst = 0, per_second = 1 }", "burst"),
    "a limit that never recovers": ("rates.BindDriver = { burst = 1, per_second = 0 }", "per_second"),
    "no number": ("rates.BindDriver = { burst = 1, per_second = nan }", "per_second"),
    "no bound": ("rates.BindDriver = { burst = 1, per_second = inf }", "per_second"),
    "too long": ("#" * 70_000, "longer than"),
    "deeply nested": ("x = " + "[" * 20_000, "policy.toml"),
}


@pytest.mark.parametrize(("text", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_file_is_refused_with_a_sentence(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(said)):
        narrow(BUILTIN, policy_file(tmp_path, text), os.geteuid())


def test_a_file_that_others_could_have_written_is_refused(tmp_path: Path) -> None:
    path = policy_file(tmp_path, "")
    for mode in (0o664, 0o646):
        path.chmod(mode)
        with pytest.raises(PolicyError, match=f"the policy file {path} can be written by others"):
            narrow(BUILTIN, path, os.geteuid())
    path.chmod(0o644)
    link = tmp_path / "elsewhere" / "link.toml"
    link.parent.mkdir(mode=0o777)
    link.parent.chmod(0o777)  # like a ConfigMap's mount: only the directory of the file itself counts
    link.symlink_to(path)
    assert narrow(BUILTIN, link, os.geteuid()) == BUILTIN
    for mode in (0o775, 0o757, 0o1777):
        tmp_path.chmod(mode)
        for name in (path, link):
            with pytest.raises(PolicyError, match=f"{tmp_path}, where {name} is, can be written by others"):
                narrow(BUILTIN, name, os.geteuid())
    tmp_path.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(path, 1234, -1)
        with pytest.raises(PolicyError, match="belongs to uid 1234"):
            narrow(BUILTIN, path, 0)
        os.chown(path, 0, -1)
        os.chown(tmp_path, 1234, -1)
        with pytest.raises(PolicyError, match=f"{tmp_path}, where {path} is, belongs to uid 1234"):
            narrow(BUILTIN, path, 0)


def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, said in (
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(PolicyError, match=said):
            narrow(BUILTIN, path, os.geteuid())
