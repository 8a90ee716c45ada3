"""`qat-plugin provision` and `qat-plugin config check`: their options, and what becomes of their errors."""

import contextlib
import logging
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from qat_server.command_line import extensions
from qat_server.command_line.provision_once import ALL_DRIVERS, Once, Outcome, check, provision
from qat_server.command_line.settings import SettingsError, check_sysfs_root
from qat_server.devices.pci_bus import VF_DRIVERS
from qat_server.parsing import values
from qat_server.provisioning import configuration
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.qat_conf import ConfigurationError

_NODE_NAME: Final = typer.Option(
    "--node-name",
    metavar="NAME",
    help="qat-NAME.conf wins over qat.conf",
    envvar=["QAT_PLUGIN_NODE_NAME", "NODE_NAME"],
)
_SYSFS_ROOT: Final = typer.Option("--sysfs-root", metavar="DIR", help="where sysfs is", envvar="QAT_PLUGIN_SYSFS_ROOT")
_NodeName = Annotated[str, _NODE_NAME]
_SysfsRoot = Annotated[str, _SYSFS_ROOT]

config = typer.Typer(rich_markup_mode=None, help="The provisioning configuration.")


@config.callback()
def _config() -> None:
    """The provisioning configuration."""


def add_to(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("provision")(_provision)
    config.command("check")(_check)
    app.add_typer(config, name="config")


def _provision(
    directory: Annotated[
        str,
        typer.Option(
            "--provisioning-config",
            metavar="DIR",
            help="where qat.conf and qat.toml are",
            envvar="QAT_PLUGIN_PROVISIONING_CONFIG",
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan, and do nothing")] = False,
    init: Annotated[
        bool,
        typer.Option("--init", help="exit 0 also when there is nothing to do or VFs are in use, as an init container"),
    ] = False,
    node_name: _NodeName = "",
    sysfs_root: _SysfsRoot = "/sys",
    helper_socket: Annotated[
        str,
        typer.Option(
            "--helper-socket", metavar="PATH", help="where qat-helper listens", envvar="QAT_PLUGIN_HELPER_SOCKET"
        ),
    ] = "/run/qat-plugin/helper.sock",
    kernel_vf_drivers: Annotated[
        str, typer.Option("--kernel-vf-drivers", metavar="LIST", help="kernel VF drivers whose PFs are provisioned")
    ] = ",".join(ALL_DRIVERS),
    wait: Annotated[str, typer.Option("--wait", metavar="DURATION", help="for the helper to be there")] = "30s",
) -> None:
    """Make the PFs what qat.conf and qat.toml want, once, and exit.

    Exit status: 0 done, 10 nothing to do, 11 VFs are in use (all else is done), 1 failed, 2 a setting is wrong.
    """
    _quiet()
    once = Once(
        configuration=_load(directory, node_name),
        sysfs_root=_root(sysfs_root),
        helper_socket=Path(helper_socket),
        kernel_vf_drivers=_read("kernel-vf-drivers", kernel_vf_drivers),
        dry_run=dry_run,
        patience=_duration(wait),
    )
    outcome = provision(once, _console())
    if init and outcome in (Outcome.NOTHING_TO_DO, Outcome.WAITING):
        outcome = Outcome.DONE
    raise typer.Exit(int(outcome))


def _check(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="where qat.conf and qat.toml are")],
    node: Annotated[
        str, typer.Option("--node", metavar="FILE", help="a node description (JSON), not this machine")
    ] = "",
    node_name: _NodeName = "",
    sysfs_root: _SysfsRoot = "/sys",
) -> None:
    """Check qat.conf and qat.toml, and show the plan for this machine or a described node. Needs no helper.

    Exit status: 0 all of it can be, 1 some PF cannot be what is wanted, 2 the files or a setting are wrong.
    """
    _quiet()
    wanted = _load(directory, node_name)
    with _described(node) if node else contextlib.nullcontext(_root(sysfs_root)) as root:
        good = check(wanted, root, ALL_DRIVERS, _console())
    raise typer.Exit(0 if good else 1)


def _described(node: str) -> AbstractContextManager[Path]:
    """The sysfs root of a described node. Raises SettingsError, and FlagError where no distribution makes one."""
    try:
        return extensions.described_node(Path(node))
    except (OSError, ValueError) as error:
        raise SettingsError(f"--node: {error}") from None


def _load(directory: str, node_name: str) -> Configuration:
    try:
        return configuration.load(Path(directory), node_name or None)
    except ConfigurationError as error:
        raise SettingsError(str(error)) from None


def _root(text: str) -> Path:
    root = Path(text)
    check_sysfs_root(root)
    return root


def _read(flag: str, text: str) -> tuple[str, ...]:
    try:
        return values.names(text, VF_DRIVERS, "kernel VF driver")
    except ValueError as error:
        raise SettingsError(f"--{flag}: {error}") from None


def _duration(text: str) -> float:
    try:
        return values.duration(text, 0.0, zero_is_off=True)
    except ValueError as error:
        raise SettingsError(f"--wait: {error}") from None


def _quiet() -> None:
    """What the parts log is said here in sentences."""
    logging.getLogger("qat_server").setLevel(logging.CRITICAL)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _console() -> Console:
    return Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
