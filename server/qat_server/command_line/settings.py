"""The server's settings: flag texts in, validated and frozen Settings out, or a SettingsError with one sentence.

`parse` is pure. Only `check_sysfs_root` reads the machine: it checks that --sysfs-root is a sysfs tree.
"""

import os
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol, TypeVar

from msgspec import Struct

from qat_server.command_line.flags import SERVER_FLAGS
from qat_server.devices.pci_bus import VF_DRIVERS
from qat_server.kubelet.allocation import AllocationPolicy
from qat_server.kubelet.registration.directories import Registration, longest_socket, socket_directory
from qat_server.logs.settings import LogFormat, LogSettings
from qat_server.parsing import values
from qat_server.parsing.values import HostPort
from qat_shared import SUN_PATH_LIMIT
from qat_shared.messages import DpdkDriver
from qat_shared.sysfs import SysfsError, pci_directory
from qat_shared.values import boolean, integer

_T = TypeVar("_T")

_MIN_INTERVAL: Final = 0.01  # seconds: a shorter one would be a busy loop
_VARIABLES: Final = {flag.name: flag.variable for flag in SERVER_FLAGS}
_DEFAULTS: Final = {flag.name: flag.default for flag in SERVER_FLAGS}
_WITHOUT_EFFECT: Final = tuple(flag.name for flag in SERVER_FLAGS if not flag.effect)
# klog: "no effect when -logtostderr=true".
_FILES_ONLY: Final = (
    "log_dir",
    "log_file",
    "log_file_max_size",
    "one_output",
    "skip_log_headers",
    "alsologtostderr",
    "alsologtostderrthreshold",
)


class Mode(StrEnum):
    """The users of the VFs."""

    DPDK = "dpdk"


class SettingsError(Exception):
    """The text of a flag is invalid: one sentence that names the flag or its environment variable."""


class Settings(Struct, frozen=True, kw_only=True):
    """The value of each flag. Intervals are in seconds. 0 (interval) and None (address, directory) mean off."""

    dpdk_driver: DpdkDriver
    kernel_vf_drivers: tuple[str, ...]
    max_num_devices: int
    allocation_policy: AllocationPolicy
    mode: Mode
    sysfs_root: Path
    kubelet_dir: Path
    helper_socket: Path
    registration: Registration
    metrics_address: HostPort | None
    status_http: bool
    provisioning_config: Path | None
    node_name: str | None
    drain: bool
    health_interval: float
    resync_interval: float
    uevents: str
    require_sandbox: bool
    allow_root: bool
    logging: LogSettings

    @property
    def socket_directory(self) -> Path:
        """The directory of the endpoints' sockets, the only directory of the kubelet that the server writes to."""
        return socket_directory(self.kubelet_dir, self.registration)


def parse(given: Mapping[str, str] | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """The settings from texts by flag name. Raises SettingsError.

    `given` (the command line) takes precedence over `environment` (the texts of the flags' variables), which takes
    precedence over the defaults. Names that are not in SERVER_FLAGS are a defect of the caller (KeyError).
    """
    given, environment = given or {}, environment or {}
    texts = _DEFAULTS | dict(environment) | dict(given)
    if unknown := texts.keys() - _DEFAULTS.keys():
        raise KeyError(*unknown)

    def read(name: str, parser: Callable[[str], _T]) -> _T:
        try:
            return parser(texts[name])
        except ValueError as error:
            source = _VARIABLES[name] if name in environment and name not in given else f"--{name}"
            raise SettingsError(f"{source}: {error}") from None

    settings = Settings(
        dpdk_driver=read("dpdk-driver", _dpdk_driver),
        kernel_vf_drivers=read("kernel-vf-drivers", lambda text: values.names(text, VF_DRIVERS, "kernel VF driver")),
        max_num_devices=read("max-num-devices", lambda text: integer(text, minimum=1)),
        allocation_policy=read("allocation-policy", allocation_policy),
        mode=read("mode", _mode),
        sysfs_root=read("sysfs-root", _path),
        kubelet_dir=read("kubelet-dir", _path),
        helper_socket=read("helper-socket", _socket_path),
        registration=read("registration", _registration),
        metrics_address=read("metrics-address", values.host_port),
        status_http=read("status-http", boolean),
        provisioning_config=read("provisioning-config", lambda text: Path(text) if text else None),
        node_name=read("node-name", lambda text: text or None),
        drain=read("drain-for-reconfiguration", boolean),
        health_interval=read("health-interval", lambda text: values.duration(text, _MIN_INTERVAL, zero_is_off=True)),
        resync_interval=read("resync-interval", lambda text: values.duration(text, _MIN_INTERVAL)),
        uevents=read("uevents", _uevents),
        require_sandbox=read("require-sandbox", boolean),
        allow_root=read("allow-root", boolean),
        logging=_logging(read, frozenset((*given, *environment))),
    )
    read("kubelet-dir", lambda _: _check_length(longest_socket(settings.kubelet_dir, settings.registration)))
    return settings


def check_sysfs_root(root: Path) -> None:
    """Raise SettingsError if `root` is not a readable sysfs tree with a PCI bus."""
    try:
        pci_directory(root)
    except SysfsError as error:
        raise SettingsError(f"--sysfs-root: {error}") from None


def allocation_policy(text: str) -> AllocationPolicy:
    """balanced, packed, or "" for none. Raises ValueError."""
    if not text:
        return AllocationPolicy.NONE
    choices = (AllocationPolicy.BALANCED.value, AllocationPolicy.PACKED.value)
    return AllocationPolicy(_one_of(text, choices, "policy"))


def _dpdk_driver(text: str) -> DpdkDriver:
    return DpdkDriver(_one_of(text, tuple(driver.value for driver in DpdkDriver), "driver"))


def _mode(text: str) -> Mode:
    if text == "kernel":
        raise ValueError("'kernel' is planned for a later version; this version supports dpdk")
    return Mode(_one_of(text, tuple(mode.value for mode in Mode), "mode"))


def _registration(text: str) -> Registration:
    return Registration(_one_of(text, tuple(way.value for way in Registration), "registration method"))


def _uevents(text: str) -> str:
    if text.startswith("unix:"):
        _socket_path(text.removeprefix("unix:"))
    elif text != "netlink":
        raise ValueError(f"{text[:60]!r} is neither netlink nor unix:PATH")
    return text


def _path(text: str) -> Path:
    if not text:
        raise ValueError("a path is required")
    return Path(text)


def _socket_path(text: str) -> Path:
    path = _path(text)
    _check_length(path)
    return path


def _check_length(socket: Path) -> None:
    length = len(os.fsencode(socket))
    if length > SUN_PATH_LIMIT:
        raise ValueError(
            f"the socket path {socket} is {length} bytes long, but the system allows {SUN_PATH_LIMIT}:"
            " choose a shorter directory"
        )


def _one_of(text: str, choices: tuple[str, ...], kind: str) -> str:
    if text not in choices:
        known = "known are" if len(choices) > 1 else "the only one is"
        raise ValueError(f"unknown {kind} {text[:60]!r}; {known} {values.listed(choices)}")
    return text


class _Reader(Protocol):
    def __call__(self, name: str, parser: Callable[[str], _T], /) -> _T: ...


def _logging(read: _Reader, given: frozenset[str]) -> LogSettings:
    to_stderr = read("logtostderr", boolean)
    legacy = read("legacy_stderr_threshold_behavior", boolean)
    ineffective = [name for name in _WITHOUT_EFFECT if name in given]
    if to_stderr:
        ineffective += [name for name in _FILES_ONLY if name in given]
        if legacy and "stderrthreshold" in given:
            ineffective.append("stderrthreshold")
    return LogSettings(
        verbosity=read("v", integer),
        modules=read("vmodule", values.vmodule),
        format=LogFormat(
            read("log-format", lambda text: _one_of(text, tuple(known.value for known in LogFormat), "format"))
        ),
        to_stderr=to_stderr,
        also_to_stderr=read("alsologtostderr", boolean),
        stderr_threshold=read("stderrthreshold", values.severity),
        also_to_stderr_threshold=read("alsologtostderrthreshold", values.severity),
        legacy_stderr_threshold=legacy,
        directory=read("log_dir", str),
        file=read("log_file", str),
        file_max_size=read("log_file_max_size", lambda text: integer(text, minimum=0, maximum=2**40)) * 2**20,
        one_output=read("one_output", boolean),
        directory_in_header=read("add_dir_header", boolean),
        headers=not read("skip_headers", boolean),
        file_headers=not read("skip_log_headers", boolean),
        ineffective=tuple(ineffective),
    )
