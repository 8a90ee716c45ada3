"""The configuration of a node: which files are read, their precedence, and a ConfigMap's mount during a replacement."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from qat_server.devices.inventory import PhysicalFunction
from qat_server.provisioning import configuration as subject
from qat_server.provisioning.configuration import DesiredState, load
from qat_server.provisioning.qat_conf import ConfigurationError
from support.sysfs_tree import address

PF = PhysicalFunction(
    address=address("6b:00.0"),
    device_id=0x4940,
    driver="4xxx",
    numa_node=0,
    state="up",
    services="sym;asym",
    total_vfs=16,
    vfs=(),
)
OTHER = replace(PF, address=address("f3:00.0"), device_id=0x4948, numa_node=1)


def _write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        (directory / name.replace("__", "-").replace("_", ".")).write_text(text)
    return directory


def test_empty_directory_enables_all_vfs_and_changes_nothing_else(tmp_path: Path) -> None:
    found = load(tmp_path, "node1")
    assert found.files == ()
    assert found.desired_state(PF) == DesiredState(None, None, None, None, "")


def test_conf_applies_to_all_pfs(tmp_path: Path) -> None:
    found = load(_write(tmp_path, qat_conf="\nServicesEnabled=dc\nAutoresetEnabled=on"))
    assert found.files == ("qat.conf",)
    expected = DesiredState(("dc",), True, None, None, "qat.conf line 2")
    assert found.desired_state(PF) == found.desired_state(OTHER) == expected


def test_conf_of_the_node_replaces_the_common_one(tmp_path: Path) -> None:
    _write(tmp_path, qat_conf="ServicesEnabled=sym\nAutoresetEnabled=on", qat__node1_conf="ServicesEnabled=dc")
    found = load(tmp_path, "node1")
    assert found.files == ("qat-node1.conf",)
    assert found.desired_state(PF) == DesiredState(("dc",), None, None, None, "qat-node1.conf line 1")
    assert load(tmp_path, "node2").files == load(tmp_path, None).files == ("qat.conf",)


@pytest.mark.parametrize("name", ["../etc/passwd", "a/b", "", ".", "a\0b", "a" * 254, "node 1"])
def test_invalid_node_name(tmp_path: Path, name: str) -> None:
    if not name:  # NODE_NAME is not set
        assert load(tmp_path, name).files == ()
        return
    with pytest.raises(ConfigurationError, match="is not a valid node name"):
        load(tmp_path, name)


def test_longest_node_name_has_no_file_of_its_own(tmp_path: Path) -> None:
    assert load(_write(tmp_path, qat_conf=""), "a" * 253).files == ("qat.conf",)


RULES = """
[defaults]
services = "sym"
auto_reset = false
vfs = 8
pm_idle_enabled = true
[[rules]]
numa_node = 0
services = "asym"
pm_idle_enabled = false
[[rules]]
device_id = "4940"
services = "dc"
[[rules]]
address = "0000:6b:00.0"
vfs = "all"
"""


def test_each_setting_comes_from_the_most_specific_place(tmp_path: Path) -> None:
    found = load(_write(tmp_path, qat_toml=RULES, qat_conf="ServicesEnabled=dcc\nAutoresetEnabled=on"))
    assert found.files == ("qat.conf", "qat.toml")
    assert found.desired_state(PF) == DesiredState(("dc",), True, None, False, "qat.toml rules[1]")
    assert found.desired_state(OTHER) == DesiredState(("dcc",), True, 8, True, "qat.conf line 1")


def test_defaults_apply_last(tmp_path: Path) -> None:
    found = load(_write(tmp_path, qat_toml='[defaults]\nservices = "sym"'))
    assert found.desired_state(PF).services_source == "qat.toml defaults"


def test_rules_that_match_no_pf_are_named(tmp_path: Path) -> None:
    found = load(_write(tmp_path, qat_toml=RULES))
    assert found.unmatched([PF]) == ()
    assert found.unmatched([OTHER]) == ("rules[0]", "rules[1]", "rules[2]")


def test_heartbeat_interval(tmp_path: Path) -> None:
    assert load(tmp_path).heartbeat_interval is None
    assert load(_write(tmp_path, qat_toml='heartbeat_interval = "500ms"')).heartbeat_interval == 0.5


def test_equal_files_give_equal_configurations(tmp_path: Path) -> None:
    _write(tmp_path, qat_toml=RULES, qat_conf="ServicesEnabled=dc")
    before = load(tmp_path)
    assert load(tmp_path) == before
    _write(tmp_path, qat_conf="ServicesEnabled=sym")
    assert load(tmp_path) != before


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="missing: cannot be read: No such file or directory"):
        load(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match="cannot be read: Not a directory"):
        load(_write(tmp_path, qat_conf="") / "qat.conf")


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "qat.conf"
    path.mkdir()
    with pytest.raises(ConfigurationError, match=r"qat\.conf: is not a regular file"):
        load(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(ConfigurationError, match=r"qat\.conf: is not a regular file"):
        load(tmp_path)
    path.unlink()
    path.symlink_to("qat.conf")
    with pytest.raises(ConfigurationError, match=r"qat\.conf: cannot be read: Too many levels of symbolic links"):
        load(tmp_path)
    path.unlink()
    path.symlink_to("gone")
    with pytest.raises(ConfigurationError, match=r"qat\.conf: is a broken symbolic link"):
        load(tmp_path)
    path.unlink()
    path.write_bytes(b"# caf\xc3\xa9\n\xff")
    with pytest.raises(ConfigurationError, match=r"qat\.conf line 2: is not valid UTF-8"):
        load(tmp_path)
    path.write_bytes(b"#" * (subject.FILE_LIMIT + 1))
    with pytest.raises(ConfigurationError, match=r"qat\.conf: is larger than 65536 bytes"):
        load(tmp_path)


def _mount(directory: Path, version: str, **files: str) -> None:
    """Replace the mount as the kubelet does: new directory, ..data renamed over, new links, old directory removed."""
    data = directory / "..data"
    old = os.readlink(data) if data.is_symlink() else None
    (directory / version).mkdir()
    _write(directory / version, **files)
    (directory / "..data_tmp").symlink_to(version)
    (directory / "..data_tmp").rename(data)
    for path in (directory / version).iterdir():
        link = directory / path.name
        if not link.is_symlink():
            link.symlink_to(f"..data/{path.name}")
    if old is not None:
        for path in (directory / old).iterdir():
            if not (directory / version / path.name).exists():
                (directory / path.name).unlink()
            path.unlink()
        (directory / old).rmdir()


def test_configmap_mount(tmp_path: Path) -> None:
    _mount(tmp_path, "..1", qat_conf="ServicesEnabled=sym")
    assert load(tmp_path).desired_state(PF).services == ("sym",)
    _mount(tmp_path, "..2", qat_conf="ServicesEnabled=dc", qat_toml=RULES)
    assert load(tmp_path).files == ("qat.conf", "qat.toml")
    _mount(tmp_path, "..3")
    assert load(tmp_path).files == ()


@pytest.mark.parametrize("broken", [False, True], ids=["old one is valid", "old one is invalid"])
def test_configmap_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    _mount(tmp_path, "..1", qat_conf="ServicesEnabled=" if broken else "ServicesEnabled=sym", qat_toml="")
    real, swapped = subject._read, False

    def swapping(directory: int, name: str) -> str | None:
        nonlocal swapped
        text = real(directory, name)
        if not swapped:
            swapped = True
            _mount(tmp_path, "..2", qat_conf="ServicesEnabled=dc")
        return text

    monkeypatch.setattr(subject, "_read", swapping)
    found = load(tmp_path)
    assert found.files == ("qat.conf",)
    assert found.desired_state(PF).services == ("dc",)


def test_configmap_replaced_endlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(100))
    monkeypatch.setattr(subject, "_version", lambda _: str(next(numbers)))
    with pytest.raises(ConfigurationError, match="faster than the files can be read"):
        load(tmp_path)
