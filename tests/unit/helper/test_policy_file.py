"""The policy file: what each key does, what is wrong with a file that cannot be used, and who may have written it."""

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from qat_helper.console import log
from qat_helper.errors import OperationError
from qat_helper.operations.table import NAMES, OPERATIONS
from qat_helper.policy import Policy, Rate
from qat_helper.policy_file import PolicyError, narrow
from qat_shared.messages import (
    BindDriver,
    DpdkDriver,
    PrepareSocketDirectory,
    SocketDirectory,
)
from qat_shared.pci import PciAddress
from qat_simulation.kubelet.config_map import ConfigMap
from support.policy_files import BUILTIN, policy_file, rule_of, write
from support.sysfs_tree import address

VF = address("6b:00.1")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert narrow(BUILTIN, policy_file(tmp_path, ""), os.geteuid()) == BUILTIN


def test_a_full_file_narrows_and_each_denial_names_its_rule(tmp_path: Path) -> None:
    text = """
        operations = ["BindDriver"]
        addresses = ["0000:6b:00.1", "10000:e1:00.1"]
        drivers = ["igb_uio"]
        directories = ["plugins-registry"]
        device_ids = ["8086:4941"]
        max_vfs = 8
        [rates]
        all = { burst = 100, per_second = 2 }
        BindDriver = { burst = 10, per_second = 0.5 }
    """
    policy = narrow(BUILTIN, policy_file(tmp_path, text), os.geteuid())
    assert policy.uids == {65532}
    assert (policy.device_ids, policy.max_vfs) == (frozenset({(0x8086, 0x4941)}), 8)
    given = {"all": Rate(burst=100, per_second=2), "BindDriver": Rate(burst=10, per_second=0.5)}
    assert policy.rates == {**BUILTIN.rates, **given}
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


OPERATION_NAMES = ", ".join(sorted(NAMES))
KEYS = "operations, addresses, device_ids, drivers, directories, max_vfs, rates"
BURST, PER_SECOND = "a whole number from 1 to 1000000", "a number above 0 and up to 1000000"
UNUSABLE: dict[str, tuple[str | bytes, str]] = {
    "no TOML": ("\n= nonsense", " line 2: not valid TOML: Invalid statement"),
    "no value": ("drivers", " line 1: not valid TOML: Expected '=' after a key in a key/value pair"),
    "an unfinished list": ("\n\ndrivers = [\n", " line 4: not valid TOML: Invalid value"),
    "a key twice": ("max_vfs = 1\nmax_vfs = 2\n", " line 2: not valid TOML: Cannot overwrite a value"),
    "not UTF-8": (b"# \n\xff\xfe", " line 2: not UTF-8 text"),
    "an impossible date": ("x = 2026-02-30", " line 1: not valid TOML: Invalid date"),
    "unknown key": ("\nallow_all = true", f" line 2: allow_all: unknown key; known are {KEYS}"),
    "a key that this version does not have": (
        "server_uids = [0]",
        f" line 1: server_uids: unknown key; known are {KEYS}",
    ),
    "a key of another kind": ("extra_physical_ids = []", f" line 1: extra_physical_ids: unknown key; known are {KEYS}"),
    "a key of a table": ("[drivers]\nx = 1", " line 1: drivers: is not a list of texts in quotes, such as"),
    "wrong type": ('drivers = "vfio-pci"', " line 1: drivers: is not a list of texts in quotes, such as"),
    "a list of numbers": ("addresses = [1]", " line 1: addresses: is not a list of texts in quotes, such as"),
    "unknown driver": (
        'max_vfs = 1\ndrivers = [\n  "vfio-pci",  # "e1000" is not one\n  "e1000",\n]\n',
        " line 4: drivers: unknown value 'e1000'; known are igb_uio, vfio-pci",
    ),
    "unknown directory": (
        'directories = ["plugins_registry"]',
        " line 1: directories: unknown value 'plugins_registry'; known are device-plugins, plugins-registry",
    ),
    "unknown operation": (
        'operations = ["Reboot"]',
        f" line 1: operations: unknown value 'Reboot'; known are {OPERATION_NAMES}",
    ),
    "Hello cannot be forbidden": ('operations = ["Hello"]', " line 1: operations: unknown value 'Hello'; known"),
    "no domain": (
        'addresses = ["6b:00.1"]',
        " line 1: addresses: '6b:00.1' is not a PCI address in lower case, such as 0000:6b:00.1",
    ),
    "upper case": (
        'addresses = [\n  "0000:6b:00.1",\n  "0000:6B:00.1",\n]',
        " line 3: addresses: '0000:6B:00.1' is not a PCI address in lower case, such as 0000:6b:00.1",
    ),
    "no id": ('device_ids = ["8086"]', " line 1: device_ids: unknown value '8086'; known are 8086:"),
    "an id in upper case": ('device_ids = ["8086:37C8"]', " line 1: device_ids: unknown value '8086:37C8'"),
    "an id that is not QAT's": (
        'device_ids = ["8086:1592"]',
        " line 1: device_ids: unknown value '8086:1592'",
    ),
    "a negative number of VFs": ("max_vfs = -1", " line 1: max_vfs: is not a whole number from 0 to 65535"),
    "no number of VFs": ("max_vfs = true", " line 1: max_vfs: is not a whole number from 0 to 65535"),
    "a limit of no operation": (
        "rates.Reboot = { burst = 1, per_second = 1 }",
        " line 1: rates: Reboot: unknown value 'Reboot'; known are BindDriver, ",
    ),
    "a limit of Hello": ("rates.Hello = { burst = 1, per_second = 1 }", " line 1: rates: Hello: unknown value 'Hello'"),
    "no limits": ("rates = 1", " line 1: rates: is not of the form rates.NAME = { burst = 64, per_second = 2 }"),
    "half a limit": (
        "[rates]\nBindDriver = { burst = 1 }",
        " line 2: rates: BindDriver: is not of the form rates.NAME = { burst = 64, per_second = 2 }",
    ),
    "a limit with more": (
        "rates.all = { burst = 1, per_second = 1, per_hour = 1 }",
        " line 1: rates: all: is not of the form rates.NAME = { burst = 64, per_second = 2 }",
    ),
    "a limit that lets nothing pass": (
        "rates.all = { burst = 0, per_second = 1 }",
        f" line 1: rates: all: burst is not {BURST}",
    ),
    "a limit that never recovers": (
        "[rates.all]\nburst = 1\nper_second = 0",
        f" line 1: rates: all: per_second is not {PER_SECOND}",
    ),
    "no number": (
        "rates.all = { burst = 1, per_second = nan }",
        f" line 1: rates: all: per_second is not {PER_SECOND}",
    ),
    "no bound": ("rates.all = { burst = 1, per_second = inf }", f" line 1: rates: all: per_second is not {PER_SECOND}"),
    "no truth": ("rates.all = { burst = true, per_second = 1 }", f" line 1: rates: all: burst is not {BURST}"),
    "too long": ("#" * 70_000, "longer than"),
    "deeply nested": ("x = " + "[" * 20_000, " line 1: not valid TOML: nested too deeply"),
}
INTERNALS = ("$", "`", "object", "Struct", "codec", "\n")
"""What only a reader of msgspec's or Python's source would understand."""


@pytest.mark.parametrize(("text", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_file_is_refused_with_a_sentence(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = policy_file(tmp_path, text)
    with pytest.raises(PolicyError) as caught:
        narrow(BUILTIN, path, os.geteuid())
    sentence = str(caught.value)
    assert said in sentence
    if said != "longer than":
        assert sentence.startswith(f"{path}{said[:7]}")
    assert [word for word in INTERNALS if word in sentence] == []


def test_the_table_has_every_key_and_each_known_value_is_listed() -> None:
    """A key that is added must be added here: its wrong type and its wrong value each give a sentence."""
    said = "\n".join(said for _, said in UNUSABLE.values())
    for key in KEYS.split(", "):
        assert f": {key}: " in said, key


def test_a_mark_at_the_beginning_is_no_part_of_the_text(tmp_path: Path) -> None:
    """Editors on Windows write it; qat.conf may have one too."""
    assert narrow(BUILTIN, policy_file(tmp_path, "\ufeffmax_vfs = 3\n"), os.geteuid()).max_vfs == 3


@pytest.mark.parametrize(
    ("check", "line"),
    [
        (lambda policy: policy.check_driver(DpdkDriver.IGB_UIO), 'drivers = ["igb_uio"]'),
        (lambda policy: policy.check_operation("SetNumVfs"), 'operations = ["SetNumVfs"]'),
        (lambda policy: policy.check_directory(SocketDirectory.DEVICE_PLUGINS), 'directories = ["device-plugins"]'),
        (lambda policy: policy.check_address(VF), 'addresses = ["0000:6b:00.1"]'),
    ],
    ids=["drivers", "operations", "directories", "addresses"],
)
def test_a_denial_gives_the_line_that_allows(tmp_path: Path, check: Callable[[Policy], None], line: str) -> None:
    """The line is taken out of the message and added as a file of its own: then nothing is denied."""
    directory = tmp_path / "policy"
    directory.mkdir()
    write(directory / "a.toml", "operations = []\ndrivers = []\ndirectories = []\naddresses = []\n")
    with pytest.raises(OperationError, match=re.escape(f"add the line {line}, or ")):
        check(narrow(BUILTIN, directory, os.geteuid()))
    write(directory / "b.toml", line)
    check(narrow(BUILTIN, directory, os.geteuid()))


def test_the_files_of_a_directory_add_up(tmp_path: Path) -> None:
    directory = tmp_path / "policy"
    directory.mkdir()
    write(directory / "a.toml", 'operations = ["BindDriver"]\ndrivers = ["vfio-pci"]\n')
    write(
        directory / "b.toml", 'operations = ["SetNumVfs"]\nmax_vfs = 4\nrates.BindDriver = {burst = 1, per_second = 1}'
    )
    write(directory / ".c.toml.swp", "not read")
    policy = narrow(BUILTIN, directory, os.geteuid())
    assert policy.operations == {"BindDriver", "SetNumVfs"}
    assert policy.drivers == {DpdkDriver.VFIO_PCI}
    assert policy.max_vfs == 4
    assert policy.rates == {**BUILTIN.rates, "BindDriver": Rate(burst=1, per_second=1)}
    for text, said in (
        ("max_vfs = 5", "c.toml line 1: max_vfs: is set in another file too: keep one of them"),
        ("\nrates.all = {burst = 1, per_second = 1}", "c.toml line 2: rates: is set in another file too"),
        ("nonsense = 1", "c.toml line 1: nonsense: unknown key"),
    ):
        write(directory / "c.toml", text)
        with pytest.raises(PolicyError, match=re.escape(said)):
            narrow(BUILTIN, directory, os.geteuid())


def test_a_directory_without_policy_files_is_refused(tmp_path: Path) -> None:
    """A ConfigMap that lost its keys, or whose files are named otherwise, must not mean that all is allowed."""
    with pytest.raises(PolicyError, match="has no policy file: without any, all would be allowed"):
        narrow(BUILTIN, tmp_path, os.geteuid())
    write(tmp_path / "policy.toml~", "")
    with pytest.raises(PolicyError, match=r"policy\.toml~ is not a \.toml file"):
        narrow(BUILTIN, tmp_path, os.geteuid())


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
    os.mkfifo(tmp_path / "pipe.toml", 0o600)
    for path, said in (
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "no", "No such"),
        (tmp_path, "pipe is not a .toml file"),
    ):
        with pytest.raises(PolicyError, match=said):
            narrow(BUILTIN, path, os.geteuid())


@pytest.mark.parametrize("name", ["", "serve.toml"], ids=["the mount", "a file in it"])
def test_a_config_map_as_the_kubelet_writes_it(tmp_path: Path, name: str) -> None:
    """The mount itself is 0777 and holds links; what they lead to is the kubelet's alone."""
    mount = ConfigMap(tmp_path / "policy", 0o444)
    mount.write({"serve.toml": 'operations = ["BindDriver"]\n', "driver.toml": 'drivers = ["vfio-pci"]\n'})
    path = mount.directory / name
    assert stat.S_IMODE(mount.directory.stat().st_mode) == 0o777
    assert (mount.directory / "serve.toml").is_symlink()
    policy = narrow(BUILTIN, path, os.geteuid())
    assert policy.operations == {"BindDriver"}
    assert len(policy.drivers) == (2 if name else 1)
    mount.write({"serve.toml": 'operations = ["BindDriver", "SetNumVfs"]\n'})
    assert narrow(BUILTIN, path, os.geteuid()).operations == {"BindDriver", "SetNumVfs"}
    version = (mount.directory / "..data").resolve()
    for mode in (0o775, 0o757):
        version.chmod(mode)
        with pytest.raises(PolicyError, match=f"{version}, where .* is, can be written by others"):
            narrow(BUILTIN, path, os.geteuid())
    version.chmod(0o755)
    mount.write({})
    if not name:
        with pytest.raises(PolicyError, match="has no policy file"):
            narrow(BUILTIN, path, os.geteuid())


def test_what_is_beside_a_config_maps_data_is_not_read(tmp_path: Path) -> None:
    """Its mount is 0777: only the kubelet's own directory in it counts."""
    mount = ConfigMap(tmp_path / "policy", 0o444)
    mount.write({"serve.toml": "operations = []\n"})
    write(mount.directory / "more.toml", 'operations = ["SetNumVfs"]\n')
    assert narrow(BUILTIN, mount.directory, os.geteuid()).operations == frozenset()


def test_a_key_that_holds_control_characters_writes_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A terminal would obey them, and a line feed would forge a line of the helper's log."""
    path = tmp_path / "policy.toml"
    path.write_text('"\\u001b[2J\\nqat-helper: serving on /run/x" = 1\n')
    with pytest.raises(PolicyError) as raised:
        narrow(BUILTIN, path, os.geteuid())
    log(str(raised.value))
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()
    assert "unknown key" in line


@pytest.mark.parametrize("key", [".".join("a" * 34), ".".join(['"a"'] * 34), '"\\"".' + ".".join("a" * 34)])
def test_a_key_of_many_parts_is_refused_before_it_is_parsed(tmp_path: Path, key: str) -> None:
    """The parser's memory grows with the square of their number."""
    path = tmp_path / "policy.toml"
    path.write_text(f"operations = []\n{key} = 1\n")
    with pytest.raises(PolicyError, match="line 2: has more than 32 dots outside quotes"):
        narrow(BUILTIN, path, os.geteuid())


def test_many_addresses_on_one_line_are_not_too_many_dots(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    addresses = [f"0000:6b:{number // 8:02x}.{number % 8}" for number in range(128)]
    path.write_text(f"addresses = {addresses}\n")
    assert len(narrow(BUILTIN, path, os.geteuid()).addresses or ()) == 128
