"""The `status` command: its options, its output and its exit status."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qat_server.command_line.flags import PROGRAM
from qat_server.command_line.settings import SettingsError
from qat_server.kubelet.registration.directories import Registration, socket_directory
from qat_server.observability.status_format import STATUS_SOCKET
from qat_server.parsing import values


def status(
    kubelet_dir: Annotated[
        Path,
        typer.Option(
            "--kubelet-dir", metavar="DIR", help="the server's --kubelet-dir", envvar="QAT_PLUGIN_KUBELET_DIR"
        ),
    ] = Path("/var/lib/kubelet"),
    metrics_address: Annotated[
        str,
        typer.Option(
            "--metrics-address",
            metavar="HOST:PORT",
            help="query the server at this address, where it runs with --status-http",
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print the server's answer unchanged, as JSON")] = False,
) -> None:
    """Show the PFs, VFs, resources and helper state of this node's server. Run it as the server's user or as root."""
    from qat_server.command_line.status import client  # noqa: PLC0415 - only this command needs it

    try:
        address = values.host_port(metrics_address)
    except ValueError as error:
        raise SettingsError(f"--metrics-address: {error}") from None
    try:
        if address is not None:
            text = client.fetch(address)
        else:
            text = client.fetch_local([socket_directory(kubelet_dir, way) / STATUS_SOCKET for way in Registration])
        answer = client.decoded(text)
    except client.StatusError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        raise typer.Exit(1) from None
    if as_json:
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
        return
    from rich.console import Console  # noqa: PLC0415 - for a terminal only

    from qat_server.command_line.status import view  # noqa: PLC0415 - as above

    # In a pipe or a file, lines are not folded at 80 columns.
    view.show(answer, Console() if sys.stdout.isatty() else Console(width=200))
