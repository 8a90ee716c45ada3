"""The typer application: help, and the commands beside the server itself (demo, status, provision, config check).

The server does not come by here (main.py): typer's conversion of option values loads pydantic, 20 MiB in all that a
running server would never use again. So the server's flags are declared here for --help only.
"""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from typer.exceptions import TyperException

from qat_server import values
from qat_server.flags import SERVER_FLAGS, Flag, FlagError, plain
from qat_server.provisioning import command_line
from qat_server.settings import SettingsError, allocation_policy
from qat_shared import VERSION

PROGRAM = "qat-plugin"

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def run(arguments: Sequence[str]) -> int:
    """Run a command (its name first), or show help. Raises FlagError and SettingsError for bad input."""
    line = list(arguments)
    if line and not line[0].startswith("-"):
        names = 2 if line[0] == "config" and len(line) > 1 and not line[1].startswith("-") else 1
        flags = _command_flags(*line[:names])
        line[names:] = ["--help" if word == "--h" else word for word in plain(line[names:], flags)]
    try:
        result: object = app(args=line, prog_name=PROGRAM, standalone_mode=False)
    except TyperException as error:
        raise FlagError(error.format_message()) from None
    except typer.Abort:
        return 130
    return result if isinstance(result, int) else 0


def _command_flags(*names: str) -> list[Flag]:
    """What typer knows of a command's options, so that Go's spellings work there too."""
    command: Any = typer.main.get_group(app)
    for name in names:
        known = command.commands
        command = known.get(name)
        if command is None:
            raise FlagError(f"unknown command {name[:60]!r}; there are {', '.join(sorted(known))}")
    found = [Flag("help", "", "", ""), Flag("h", "", "", "")]
    for parameter in command.params:
        metavar = "" if getattr(parameter, "is_flag", False) else "VALUE"
        found += [Flag(option.lstrip("-"), "", metavar, "") for option in parameter.opts if option.startswith("--")]
    return found


def _documented(callback: Callable[..., None]) -> Callable[..., None]:
    """Give a callback the server's flags as options, out of the one table that there is."""
    parameters = [
        inspect.Parameter(
            flag.variable.lower(),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(f"--{flag.name}", metavar=flag.metavar or "BOOL", help=_help(flag), show_default=False),
            ],
        )
        for flag in SERVER_FLAGS
    ]
    parameters.append(
        inspect.Parameter(
            "version",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[bool | None, typer.Option("--version", help="Show the version and exit.")],
        )
    )
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return callback


def _help(flag: Flag) -> str:
    return f"{flag.help} [{flag.default}]" if flag.default else flag.help


@app.callback(invoke_without_command=True)
@_documented
def server(**_: str | bool | None) -> None:
    """Serve the QAT devices of this node to its kubelet. Without a command, the server runs.

    Flags are written -name value, -name=value, --name value or --name=value; a boolean alone is true. Each may be given
    as an environment variable too (QAT_PLUGIN_MAX_NUM_DEVICES=32); the flag wins. Defaults stand in brackets.
    """


command_line.add_to(app)


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="leave the node running until interrupted")] = False,
    node: Annotated[str | None, typer.Option("--node", metavar="FILE", help="another node description (JSON)")] = None,
    policy: Annotated[str, typer.Option("--policy", metavar="POLICY", help="balanced or packed")] = "balanced",
) -> None:
    """Run the real helper and server on a simulated node and show each step. Needs no hardware and no root."""
    try:
        chosen = allocation_policy(policy)
    except ValueError as error:
        raise SettingsError(f"--policy: {error}") from None
    if node is not None and not Path(node).is_file():
        raise SettingsError(f"--node: there is no file {node[:200]!r}")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # as in main.py
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # it starts processes, none of which inherits gRPC
    from qat_server.simulation import demo as simulation  # noqa: PLC0415 - the server never needs it

    raise typer.Exit(simulation.run(Path(node) if node else None, chosen, keep))


@app.command()
def status(
    metrics_address: Annotated[
        str,
        typer.Option(
            "--metrics-address", metavar="HOST:PORT", help="as the server has it", envvar="QAT_PLUGIN_METRICS_ADDRESS"
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print what the server said as it is")] = False,
) -> None:
    """Show what a running server knows: PFs, VFs, resources, the helper."""
    from qat_server.status_client import StatusError, fetch  # noqa: PLC0415 - the server never needs it

    try:
        address = values.host_port(metrics_address)
    except ValueError as error:
        raise SettingsError(f"--metrics-address: {error}") from None
    if address is None:
        raise SettingsError("--metrics-address: say where the server serves its status, as in 127.0.0.1:9090")
    try:
        _print_status(fetch(address), as_json=as_json)
    except StatusError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        raise typer.Exit(1) from None


def _print_status(text: bytes, *, as_json: bool) -> None:
    from rich.console import Console  # noqa: PLC0415 - rich is for terminals

    from qat_server import status_view  # noqa: PLC0415
    from qat_server.status import decode  # noqa: PLC0415
    from qat_server.status_client import StatusError  # noqa: PLC0415

    try:
        decoded = decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StatusError(f"the answer is not a status of qat-plugin {VERSION}: {error}") from None
    if as_json:
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
        return
    # Into a pipe or file: no folding at 80 columns.
    status_view.show(decoded, Console() if sys.stdout.isatty() else Console(width=200))
