"""The options of `qat-plugin provision` and `qat-plugin config check`, and their exit statuses."""

import asyncio
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
from qat_server.command_line.provision.plan_table import show
from qat_server.command_line.provision.run import Outcome, plan_node, provision
from qat_server.command_line.settings import SettingsError, check_sysfs_root
from qat_server.devices.pci_bus import VF_DRIVERS
from qat_server.parsing import values
from qat_server.provisioning import configuration
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.qat_conf import ConfigurationError
from qat_shared.devices import PHYSICAL, VIRTUAL

_ALL_DRIVERS: Final = tuple(
    sorted({kind.driver for kind in VIRTUAL.values() if PHYSICAL[kind.physical].provisioned}),
)
"""The kernel VF drivers of all PFs that can be provisioned."""

_DIRECTORY_HELP: Final = "directory of qat.conf and qat.toml"
_NODE_NAME: Final = typer.Option(
    "--node-name",
    metavar="NAME",
    help="read qat-NAME.conf, where it exists, instead of qat.conf",
    envvar=["QAT_PLUGIN_NODE_NAME", "NODE_NAME"],
)
_SYSFS_ROOT: Final = typer.Option(
    "--sysfs-root", metavar="DIR", help="where sysfs is mounted", envvar="QAT_PLUGIN_SYSFS_ROOT"
)
_NodeName = Annotated[str, _NODE_NAME]
_SysfsRoot = Annotated[str, _SYSFS_ROOT]

config = typer.Typer(rich_markup_mode=None)


@config.callback()
def _config() -> None:
    """Check the provisioning configuration."""


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
            help=_DIRECTORY_HELP,
            envvar="QAT_PLUGIN_PROVISIONING_CONFIG",
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan without changing anything")] = False,
    init: Annotated[
        bool,
        typer.Option("--init", help="for init containers: also exit 0 when there is nothing to do or VFs are in use"),
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
        str, typer.Option("--kernel-vf-drivers", metavar="LIST", help="provision the PFs of these kernel VF drivers")
    ] = ",".join(_ALL_DRIVERS),
    wait: Annotated[str, typer.Option("--wait", metavar="DURATION", help="how long to wait for the helper")] = "30s",
) -> None:
    """Provision the PFs as qat.conf and qat.toml specify, once, and exit.

    Exit status: 0 done, 10 nothing to do, 11 VFs are in use (everything else is done), 1 at least one PF failed, or
    there is no helper, 2 a file or an option is invalid.
    """
    _silence_logs()
    outcome = asyncio.run(
        provision(
            configuration=_load(directory, node_name),
            sysfs_root=_checked_root(sysfs_root),
            helper_socket=Path(helper_socket),
            kernel_vf_drivers=_drivers(kernel_vf_drivers),
            dry_run=dry_run,
            helper_timeout=_duration(wait),
            console=_console(),
        )
    )
    if init and outcome in (Outcome.NOTHING_TO_DO, Outcome.WAITING):
        outcome = Outcome.DONE
    raise typer.Exit(int(outcome))


def _check(
    directory: Annotated[str, typer.Argument(metavar="DIR", help=_DIRECTORY_HELP)],
    node: Annotated[
        str, typer.Option("--node", metavar="FILE", help="plan for this node description (JSON), not for this machine")
    ] = "",
    node_name: _NodeName = "",
    sysfs_root: _SysfsRoot = "/sys",
) -> None:
    """Check qat.conf and qat.toml, and show the plan for this machine or a described node. Needs no helper.

    The plan assumes that no pod holds a VF. Exit status: 0 the plan can be carried out, 1 at least one PF does not
    support the configuration, 2 a file or an option is invalid.
    """
    _silence_logs()
    loaded = _load(directory, node_name)
    with _described(node) if node else contextlib.nullcontext(_checked_root(sysfs_root)) as root:
        planned = plan_node(loaded, root, _ALL_DRIVERS, holders={})
    show(planned, loaded, _console())
    raise typer.Exit(int(any(each.impossible for each in planned.pfs)))


def _described(node: str) -> AbstractContextManager[Path]:
    """The sysfs root of a described node. Raises SettingsError, and FlagError where no distribution provides one."""
    try:
        return extensions.described_node(Path(node))
    except (OSError, ValueError) as error:
        raise SettingsError(f"--node: {error}") from None


def _load(directory: str, node_name: str) -> Configuration:
    try:
        return configuration.load(Path(directory), node_name or None)
    except ConfigurationError as error:
        raise SettingsError(str(error)) from None


def _checked_root(text: str) -> Path:
    root = Path(text)
    check_sysfs_root(root)
    return root


def _drivers(text: str) -> tuple[str, ...]:
    try:
        return values.names(text, VF_DRIVERS, "kernel VF driver")
    except ValueError as error:
        raise SettingsError(f"--kernel-vf-drivers: {error}") from None


def _duration(text: str) -> float:
    try:
        return values.duration(text, 0.0, zero_is_off=True)
    except ValueError as error:
        raise SettingsError(f"--wait: {error}") from None


def _silence_logs() -> None:
    """Silence the server's loggers: the commands print sentences instead."""
    logging.getLogger("qat_server").setLevel(logging.CRITICAL)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _console() -> Console:
    return Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
