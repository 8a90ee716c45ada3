"""Settings: the value of each flag's text, and one sentence for each invalid text."""

from pathlib import Path

import pytest

from qat_server.command_line.flags import SERVER_FLAGS, from_environment, read
from qat_server.command_line.settings import Settings, SettingsError, check_sysfs_root, parse
from qat_server.kubelet.allocation import AllocationPolicy
from qat_server.kubelet.registration.directories import longest_socket
from qat_server.kubelet.registration.plugin_watcher import socket_name
from qat_server.parsing.values import HostPort
from qat_shared.messages import DpdkDriver, SocketDirectory


def test_defaults() -> None:
    settings = parse()

    assert settings.dpdk_driver is DpdkDriver.VFIO_PCI
    assert settings.kernel_vf_drivers == ("4xxxvf", "420xxvf")
    assert settings.max_num_devices == 64
    assert settings.allocation_policy is AllocationPolicy.NONE
    assert settings.mode == "dpdk"
    assert settings.sysfs_root == Path("/sys")
    assert settings.kubelet_dir == Path("/var/lib/kubelet")
    assert settings.helper_socket == Path("/run/qat-plugin/helper.sock")
    assert settings.registration == "kubelet-socket"
    assert settings.socket_directory == Path("/var/lib/kubelet/device-plugins/qat.intel.com")
    assert settings.metrics_address is None
    assert settings.health_interval == 5.0
    assert settings.resync_interval == 60.0
    assert settings.uevents == "netlink"
    assert settings.logging.to_stderr
    assert settings.logging.file_max_size == 1800 * 2**20
    assert settings.logging.ineffective == ()


GOOD: dict[str, tuple[str, str, str, object]] = {
    "igb_uio": ("dpdk-driver", "igb_uio", "dpdk_driver", DpdkDriver.IGB_UIO),
    "drivers with spaces, twice": (
        "kernel-vf-drivers",
        " c6xxvf, 4xxxvf,c6xxvf ",
        "kernel_vf_drivers",
        ("c6xxvf", "4xxxvf"),
    ),
    "one device": ("max-num-devices", "1", "max_num_devices", 1),
    "balanced": ("allocation-policy", "balanced", "allocation_policy", AllocationPolicy.BALANCED),
    "packed": ("allocation-policy", "packed", "allocation_policy", AllocationPolicy.PACKED),
    "no policy": ("allocation-policy", "", "allocation_policy", AllocationPolicy.NONE),
    "seconds": ("health-interval", "7s", "health_interval", 7.0),
    "minutes": ("resync-interval", "1m", "resync_interval", 60.0),
    "off": ("health-interval", "0", "health_interval", 0.0),
    "IPv4": ("metrics-address", "127.0.0.1:9090", "metrics_address", HostPort("127.0.0.1", 9090)),
    "no address": ("metrics-address", "", "metrics_address", None),
    "uevents of a node": ("uevents", "unix:/tmp/n/uevents.sock", "uevents", "unix:/tmp/n/uevents.sock"),
}


@pytest.mark.parametrize(("flag", "text", "field", "expected"), GOOD.values(), ids=GOOD.keys())
def test_good(flag: str, text: str, field: str, expected: object) -> None:
    assert getattr(parse({flag: text}), field) == expected


BAD = {
    "unknown DPDK driver": (
        "dpdk-driver",
        "uio_pci_generic",
        "unknown driver 'uio_pci_generic'; known are vfio-pci, igb_uio",
    ),
    "unknown VF driver": (
        "kernel-vf-drivers",
        "4xxxvf,5xxxvf",
        "unknown kernel VF driver '5xxxvf'; known are 420xxvf, 4xxxvf",
    ),
    "PF driver for VF driver": ("kernel-vf-drivers", "4xxx", "unknown kernel VF driver '4xxx'"),
    "no VF driver": ("kernel-vf-drivers", " , ", "no kernel VF driver is named"),
    "unknown policy": ("allocation-policy", "random", "unknown policy 'random'; known are balanced, packed"),
    "policy none": ("allocation-policy", "none", "unknown policy 'none'"),
    "zero devices": ("max-num-devices", "0", "0 is too small, the minimum is 1"),
    "no number": ("max-num-devices", "many", "'many' is not a whole number"),
    "kernel mode": ("mode", "kernel", "is planned for a later version"),
    "unknown mode": ("mode", "turbo", "unknown mode 'turbo'; the only one is dpdk"),
    "unknown registration": (
        "registration",
        "post",
        "unknown registration method 'post'; known are kubelet-socket, plugin-watcher",
    ),
    "no port": ("metrics-address", "localhost", "not an address such as 127.0.0.1:9090"),
    "no duration": ("health-interval", "soon", "is not a duration such as 5s"),
    "too short": ("health-interval", "1ms", "too short, the minimum is 0.01s, or 0 for off"),
    "resync off": ("resync-interval", "0", "too short, the minimum is 0.01s"),
    "kubelet directory too long": ("kubelet-dir", "/" + "k" * 80, "bytes long, but the system allows 107"),
    "too long in bytes only": ("kubelet-dir", "/" + "é" * 35, "bytes long, but the system allows 107"),
    "helper socket too long": ("helper-socket", "/" + "h" * 107, "is 108 bytes long, but the system allows 107"),
    "helper socket empty": ("helper-socket", "", "a path is required"),
    "uevents from nowhere": ("uevents", "udev", "is neither netlink nor unix:PATH"),
    "uevents without a path": ("uevents", "unix:", "a path is required"),
    "uevents too long": ("uevents", "unix:/" + "u" * 107, "bytes long"),
    "log format": ("log-format", "xml", "unknown format 'xml'; known are text, json"),
    "verbosity": ("v", "loud", "'loud' is not a whole number"),
    "vmodule without level": ("vmodule", "discovery", "is not pattern=N"),
    "severity": ("stderrthreshold", "LOUD", "is not INFO, WARNING, ERROR, FATAL or 0 to 3"),
    "boolean": ("logtostderr", "yes", "'yes' is not true or false"),
    "file size": ("log_file_max_size", "-1", "too small"),
}


@pytest.mark.parametrize(("flag", "text", "phrase"), BAD.values(), ids=BAD.keys())
def test_bad(flag: str, text: str, phrase: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse({flag: text})

    sentence = str(caught.value)
    assert sentence.startswith(f"--{flag}: ")
    assert phrase in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400


def test_longest_helper_socket_fits() -> None:
    assert len(str(parse({"helper-socket": "/" + "h" * 106}).helper_socket)) == 107


def test_unknown_name_is_a_defect() -> None:
    with pytest.raises(KeyError):
        parse({"colour": "red"})


def settings_from(arguments: list[str], environment: dict[str, str]) -> Settings:
    return parse(read(arguments, SERVER_FLAGS).values, from_environment(environment))


def test_flag_wins_over_environment_over_default() -> None:
    environment = {"QAT_PLUGIN_MAX_NUM_DEVICES": "8", "QAT_PLUGIN_ALLOCATION_POLICY": "packed", "QAT_PLUGIN_V": ""}

    settings = settings_from(["-max-num-devices=16"], environment)

    assert settings.max_num_devices == 16
    assert settings.allocation_policy is AllocationPolicy.PACKED
    assert settings.logging.verbosity == 0


def test_an_error_names_the_flag_or_the_variable() -> None:
    with pytest.raises(SettingsError, match=r"^QAT_PLUGIN_MODE: 'kernel' is planned for a later version"):
        settings_from([], {"QAT_PLUGIN_MODE": "kernel"})
    with pytest.raises(SettingsError, match=r"^--mode: 'kernel' is planned for a later version"):
        settings_from(["-mode=kernel"], {"QAT_PLUGIN_MODE": "dpdk"})


INEFFECTIVE = {
    "none": ({"v": "3", "log-format": "json"}, ()),
    "always": ({"log_backtrace_at": "x.go:1"}, ("log_backtrace_at",)),
    "files while on stderr": ({"log_dir": "/x", "one_output": "true"}, ("log_dir", "one_output")),
    "threshold while on stderr": ({"stderrthreshold": "INFO"}, ("stderrthreshold",)),
    "threshold that counts": ({"stderrthreshold": "INFO", "legacy_stderr_threshold_behavior": "false"}, ()),
    "files in use": ({"logtostderr": "false", "log_dir": "/x", "stderrthreshold": "INFO"}, ()),
}


@pytest.mark.parametrize(("given", "expected"), INEFFECTIVE.values(), ids=INEFFECTIVE.keys())
def test_flags_without_effect_are_known(given: dict[str, str], expected: tuple[str, ...]) -> None:
    assert parse(given).logging.ineffective == expected


def test_sysfs_root(tmp_path: Path) -> None:
    (tmp_path / "bus/pci/devices").mkdir(parents=True)

    check_sysfs_root(tmp_path)


def test_invalid_sysfs_roots(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for root in (tmp_path, tmp_path / "missing", file):
        with pytest.raises(SettingsError, match=r"--sysfs-root: .*not a readable sysfs tree"):
            check_sysfs_root(root)


def test_the_plugin_watcher_has_a_directory_of_its_own() -> None:
    settings = parse({"registration": "plugin-watcher"})
    assert settings.socket_directory == Path("/var/lib/kubelet/plugins_registry/qat.intel.com")
    assert settings.registration.socket_directory is SocketDirectory.PLUGINS_REGISTRY
    longest = longest_socket(settings.kubelet_dir, settings.registration).name
    used = socket_name(longest.removesuffix("-01234567.sock"))
    assert len(used) == len(longest), "as long as the names that are used"


@pytest.mark.parametrize(("registration", "room"), [("kubelet-socket", 57), ("plugin-watcher", 46)])
def test_the_kubelets_directory_must_leave_room_for_the_sockets(registration: str, room: int) -> None:
    given = {"registration": registration, "kubelet-dir": "/" + "k" * (room - 1)}
    settings = parse(given)
    assert len(str(longest_socket(settings.kubelet_dir, settings.registration))) == 107
    with pytest.raises(SettingsError, match=r"--kubelet-dir: the socket path .* is 108 bytes long"):
        parse(given | {"kubelet-dir": "/" + "k" * room})
