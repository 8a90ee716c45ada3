"""The typer application: the commands, their help, and Go-style spellings of their options.

The server does not import this module (see main.py): typer loads pydantic to convert option values, which together
take 20 MiB that a running server would never use again. The server's flags are declared here for --help only.
"""

import re
from collections.abc import Sequence
from typing import Any

import typer
from typer.exceptions import TyperException

from qat_server.command_line import extensions, provision
from qat_server.command_line.doctor.command import doctor
from qat_server.command_line.flags import PROGRAM, SERVER_FLAGS, Flag, FlagError, plain
from qat_server.command_line.options import with_options
from qat_server.command_line.status.command import status

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
@with_options(SERVER_FLAGS, {"version": "Show the version and exit."})
def server(**_: str | bool | None) -> None:
    """Serve this node's QAT devices to its kubelet. Without a command, qat-plugin runs the server.

    Write flags as -name value, -name=value, --name value or --name=value; a boolean flag without a value is true. Each
    flag can also be set by an environment variable (QAT_PLUGIN_MAX_NUM_DEVICES=32); the flag takes precedence.
    Defaults are shown in brackets.
    """


app.command()(status)
app.command()(doctor)
provision.add_to(app)
for _name, _function in extensions.commands().items():
    app.command(_name)(_function)


def run(arguments: Sequence[str]) -> int:
    """Run a command (its name comes first) or show help, and return the exit status.

    Raises FlagError and SettingsError for invalid input.
    """
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


def _command_flags(*names: str) -> list[Flag]:
    """A command's options as flags, for `plain`. Raises FlagError for an unknown command."""
    command: Any = typer.main.get_group(app)
    for name in names:
        known = command.commands
        command = known.get(name)
        if command is None:
            extensions.check_installed(name)
            raise FlagError(f"unknown command {name[:60]!r}; the commands are {', '.join(sorted(known))}")
    found = [Flag("help", "", "", ""), Flag("h", "", "", "")]
    for parameter in command.params:
        metavar = "" if getattr(parameter, "is_flag", False) else parameter.metavar or "VALUE"
        found += [Flag(option.lstrip("-"), "", metavar, "") for option in parameter.opts if option.startswith("--")]
    return found


def _sentence(message: str) -> str:
    """typer's message, worded like the server's own where typer's is hard to read."""
    extra = re.fullmatch(r"Got unexpected extra arguments? ?\(?s?\)? ?\((.*)\)", message)
    return f"unexpected argument {extra[1].split()[0][:60]!r}" if extra else message
