"""The typer application: help, and the commands (status, doctor, provision, ..., and those of extensions.py).

The server does not come by here (main.py): typer's conversion of option values loads pydantic, 20 MiB in all that a
running server would never use again. So the server's flags are declared here for --help only.
"""

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from typer.exceptions import TyperException

from qat_server.command_line import extensions
from qat_server.command_line.flags import SERVER_FLAGS, Flag, FlagError, from_environment, plain
from qat_server.command_line.provision import commands as provisioning_commands
from qat_server.command_line.settings import SettingsError, check_sysfs_root, parse
from qat_server.kubelet.registration.directories import Registration, socket_directory
from qat_server.observability.status import STATUS_SOCKET
from qat_server.parsing import values
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
        raise FlagError(_sentence(error.format_message())) from None
    except typer.Abort:
        return 130
    return result if isinstance(result, int) else 0


def _sentence(message: str) -> str:
    """The same in words of ours, where typer's are not for people."""
    extra = re.fullmatch(r"Got unexpected extra arguments? ?\(?s?\)? ?\((.*)\)", message)
    return f"unexpected argument {extra[1].split()[0][:60]!r}" if extra else message


def _command_flags(*names: str) -> list[Flag]:
    """What typer knows of a command's options, so that Go's spellings work there too."""
    command: Any = typer.main.get_group(app)
    for name in names:
        known = command.commands
        command = known.get(name)
        if command is None:
            extensions.check_installed(name)
            raise FlagError(f"unknown command {name[:60]!r}; there are {', '.join(sorted(known))}")
    found = [Flag("help", "", "", ""), Flag("h", "", "", "")]
    for parameter in command.params:
        metavar = "" if getattr(parameter, "is_flag", False) else parameter.metavar or "VALUE"
        found += [Flag(option.lstrip("-"), "", metavar, "") for option in parameter.opts if option.startswith("--")]
    return found


_SWITCH = bool | None


def _with_flags(
    flags: Iterable[Flag], switches: Mapping[str, str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a callback flags of the server as options, out of the one table that there is, and switches of its own."""

    def decorate(callback: Callable[..., None]) -> Callable[..., None]:
        callback.__signature__ = _signature(flags, switches)  # type: ignore[attr-defined]
        return callback

    return decorate


def _signature(flags: Iterable[Flag], switches: Mapping[str, str]) -> inspect.Signature:
    options = [
        inspect.Parameter(
            flag.variable.lower(),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(f"--{flag.name}", metavar=flag.metavar or "BOOL", help=_help(flag), show_default=False),
            ],
        )
        for flag in flags
    ]
    options += [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_SWITCH, typer.Option(f"--{name}", help=text)],
        )
        for name, text in switches.items()
    ]
    return inspect.Signature(options)


def _help(flag: Flag) -> str:
    return f"{flag.help} [{flag.default}]" if flag.default else flag.help


@app.callback(invoke_without_command=True)
@_with_flags(SERVER_FLAGS, {"version": "Show the version and exit."})
def server(**_: str | bool | None) -> None:
    """Serve the QAT devices of this node to its kubelet. Without a command, the server runs.

    Flags are written -name value, -name=value, --name value or --name=value; a boolean alone is true. Each may be given
    as an environment variable too (QAT_PLUGIN_MAX_NUM_DEVICES=32); the flag wins. Defaults stand in brackets.
    """


provisioning_commands.add_to(app)


for _name, _function in extensions.commands().items():
    app.command(_name)(_function)


@app.command()
def status(
    kubelet_dir: Annotated[
        Path, typer.Option("--kubelet-dir", metavar="DIR", help="as the server has it", envvar="QAT_PLUGIN_KUBELET_DIR")
    ] = Path("/var/lib/kubelet"),
    metrics_address: Annotated[
        str, typer.Option("--metrics-address", metavar="HOST:PORT", help="ask a server there, maybe of another node")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print what the server said as it is")] = False,
) -> None:
    """Show what this node's server knows: PFs, VFs, resources, the helper. For its user and for root."""
    from qat_server.command_line.status_client import StatusError, fetch, fetch_local  # noqa: PLC0415 - the server never needs it

    try:
        address = values.host_port(metrics_address)
    except ValueError as error:
        raise SettingsError(f"--metrics-address: {error}") from None
    try:
        if address is not None:
            text = fetch(address)
        else:
            text = fetch_local([socket_directory(kubelet_dir, way) / STATUS_SOCKET for way in Registration])
        _print_status(text, as_json=as_json)
    except StatusError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        raise typer.Exit(1) from None


def _print_status(text: bytes, *, as_json: bool) -> None:
    from rich.console import Console  # noqa: PLC0415 - rich is for terminals

    from qat_server.command_line import status_view  # noqa: PLC0415
    from qat_server.command_line.status_client import StatusError  # noqa: PLC0415
    from qat_server.observability.status import decode  # noqa: PLC0415

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


_LOOKED_AT = frozenset(
    {"dpdk-driver", "kernel-vf-drivers", "sysfs-root", "kubelet-dir", "helper-socket", "registration"}
)


@app.command()
@_with_flags([flag for flag in SERVER_FLAGS if flag.name in _LOOKED_AT], {"json": "print the findings as JSON"})
def doctor(**given: str | bool | None) -> None:
    """Check this node or VM, and say in words what to do. Give it the server's own flags, and run it as its user.

    The exit status is 0 when nothing keeps the plugin from its work, else 1.
    """
    as_json = bool(given.pop("json"))
    texts = {flag.name: given.get(flag.variable.lower()) for flag in SERVER_FLAGS}
    chosen = {name: text for name, text in texts.items() if isinstance(text, str)}
    settings = parse(chosen, from_environment(os.environ))
    check_sysfs_root(settings.sysfs_root)
    from qat_server.command_line.doctor import report  # noqa: PLC0415 - the server never needs it

    raise typer.Exit(report.run(settings, as_json=as_json))
