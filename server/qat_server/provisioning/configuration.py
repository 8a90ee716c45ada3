"""The provisioning configuration of a node: reads its directory, and gives the desired state of each PF.

    qat-<node name>.conf, or else qat.conf   settings for all PFs
    qat.toml                                 finer settings

Each setting of a PF comes from the first of these that has it: the rules of qat.toml that match the PF (the most
specific first), the .conf file, [defaults] of qat.toml. Only one .conf file is read. Settings that no file mentions are
left unchanged. The exception is VFs: all of them are enabled unless qat.toml sets vfs.
"""

import errno
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, TypeVar

from msgspec import Struct

from qat_server.devices.inventory import PhysicalFunction
from qat_server.provisioning import qat_conf, qat_toml
from qat_server.provisioning.qat_conf import ConfigurationError, QatConf, Services
from qat_server.provisioning.qat_toml import PfSettings, QatToml
from qat_server.provisioning.steps import on_off
from qat_shared.values import shown

_T = TypeVar("_T")

FILE_LIMIT: Final = 64 * 1024
"""The largest size of a file, in bytes."""

_DATA: Final = "..data"
_ATTEMPTS: Final = 5
# A node's name is a DNS subdomain (RFC 1123).
_NODE_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", re.ASCII | re.IGNORECASE)


class DesiredState(Struct, frozen=True):
    """The desired state of one PF. None leaves a setting unchanged, but for `vfs` it means all VFs of the device.

    `services_source` is where the services are set: "qat.conf line 2", "qat.toml rules[0]".
    """

    services: Services | None = None
    auto_reset: bool | None = None
    vfs: int | None = None
    pm_idle_enabled: bool | None = None
    services_source: str = ""

    def __str__(self) -> str:
        words = [] if self.services is None else [";".join(self.services)]
        words += [] if self.auto_reset is None else [f"auto-reset {on_off(self.auto_reset)}"]
        words += [] if self.pm_idle_enabled is None else [f"pm-idle {on_off(self.pm_idle_enabled)}"]
        words.append("no VFs" if self.vfs == 0 else "all VFs")
        return ", ".join(words)


class Configuration(Struct, frozen=True):
    """The contents of the files in a directory; `files` are the names of the files that were read.

    Equal configurations give equal desired states.
    """

    conf: QatConf = QatConf()
    toml: QatToml = QatToml()
    files: tuple[str, ...] = ()

    @property
    def heartbeat_interval(self) -> float | None:
        """Seconds between two heartbeat queries, 0 for no queries, None where the files do not set it."""
        return self.toml.heartbeat_interval

    def desired_state(self, pf: PhysicalFunction) -> DesiredState:
        """The desired state of a PF, whether or not the device supports it."""
        rules = [(f"{qat_toml.FILE} {rule.name}", rule.settings) for rule in self.toml.rules if rule.matches(pf)]
        line = f" line {self.conf.services_line}" if self.conf.services_line else ""
        conf = PfSettings(services=self.conf.services, auto_reset=self.conf.auto_reset)
        layers = [
            *rules,
            (f"{self.files[0] if self.files else qat_conf.FILE}{line}", conf),
            (f"{qat_toml.FILE} defaults", self.toml.defaults),
        ]
        services, services_source = next(
            ((layer.services, name) for name, layer in layers if layer.services is not None), (None, "")
        )
        vfs = _first(layer.vfs for _, layer in layers)
        return DesiredState(
            services=services,
            auto_reset=_first(layer.auto_reset for _, layer in layers),
            vfs=vfs if isinstance(vfs, int) else None,
            pm_idle_enabled=_first(layer.pm_idle_enabled for _, layer in layers),
            services_source=services_source,
        )

    def unmatched(self, pfs: Iterable[PhysicalFunction]) -> tuple[str, ...]:
        """The names of the rules of qat.toml that match none of these PFs, in the order of the file."""
        found = tuple(pfs)
        names = [rule.name for rule in self.toml.rules if not any(rule.matches(pf) for pf in found)]
        return tuple(sorted(names, key=lambda name: (len(name), name)))


def load(directory: Path, node_name: str | None = None) -> Configuration:
    """Read the configuration; a directory without any of the files enables all VFs. Raises ConfigurationError.

    In a ConfigMap's mount, the files are links into ..data, which is a link to a directory that is replaced as a whole.
    All files that are read there are of one version, even while it is being replaced.
    """
    if node_name and not _NODE_NAME.fullmatch(node_name):
        raise ConfigurationError("NODE_NAME", f"{shown(node_name)} is not a valid node name")
    for _ in range(_ATTEMPTS):
        version = _version(directory)
        try:
            configuration = _load(directory, node_name)
        except (ConfigurationError, OSError) as error:
            if _version(directory) != version:
                continue
            if isinstance(error, OSError):
                raise ConfigurationError(str(directory), _why(error)) from None
            raise
        if _version(directory) == version:
            return configuration
    raise ConfigurationError(str(directory), f"{_DATA} is being replaced faster than the files can be read")


def _load(directory: Path, node_name: str | None) -> Configuration:
    try:
        # One descriptor for all files, so that all are read from the same directory even if ..data changes.
        descriptor = os.open(directory / _DATA, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        conf, toml, files = QatConf(), QatToml(), []
        for name in (*([f"qat-{node_name}.conf"] if node_name else []), qat_conf.FILE):
            if (text := _read(descriptor, name)) is not None:
                conf = qat_conf.parse(text, name)
                files.append(name)
                break
        if (text := _read(descriptor, qat_toml.FILE)) is not None:
            toml = qat_toml.parse(text)
            files.append(qat_toml.FILE)
    finally:
        os.close(descriptor)
    return Configuration(conf, toml, tuple(files))


def _version(directory: Path) -> str | None:
    try:
        return os.readlink(directory / _DATA)
    except OSError:
        return None


def _read(directory: int, name: str) -> str | None:
    """The text of a file, None when there is no such file. Raises ConfigurationError."""
    try:
        # O_NONBLOCK: opening a pipe would wait for its writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # the node name is too long for a file name
            return None
        if error.errno == errno.ENOENT:
            if _is_link(directory, name):
                raise ConfigurationError(name, "is a broken symbolic link") from None
            return None
        raise ConfigurationError(name, _why(error)) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigurationError(name, "is not a regular file")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            raw = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise ConfigurationError(name, _why(error)) from None
    finally:
        os.close(descriptor)
    if len(raw) > FILE_LIMIT:
        raise ConfigurationError(name, f"is larger than {FILE_LIMIT} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(name, "is not valid UTF-8", raw.count(b"\n", 0, error.start) + 1) from None


def _is_link(directory: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _why(error: OSError) -> str:
    return f"cannot be read: {os.strerror(error.errno or 0)}"


def _first(settings: Iterable[_T | None]) -> _T | None:
    return next((setting for setting in settings if setting is not None), None)
