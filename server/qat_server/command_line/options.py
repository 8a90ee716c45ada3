"""The server's flags as typer options, so that one table (flags.py) describes them for the server and the commands."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated

import typer

from qat_server.command_line.flags import Flag

_SWITCH = bool | None


def with_options(
    flags: Iterable[Flag], switches: Mapping[str, str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a callback that takes keyword arguments only with options for `flags` and `switches` (name to help).

    Each flag arrives as its text, or None if it is not given, under the name of its environment variable in lower case.
    """

    def decorate(callback: Callable[..., None]) -> Callable[..., None]:
        options = [_flag_option(flag) for flag in flags]
        options += [
            _option(name, Annotated[_SWITCH, typer.Option(f"--{name}", help=text)]) for name, text in switches.items()
        ]
        callback.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        return callback

    return decorate


def given_flags(flags: Iterable[Flag], arguments: Mapping[str, str | bool | None]) -> dict[str, str]:
    """The names and texts of those flags that a callback decorated by `with_options` was called with."""
    texts = {flag.name: arguments[_parameter(flag)] for flag in flags}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _flag_option(flag: Flag) -> inspect.Parameter:
    text = f"{flag.help} [{flag.default}]" if flag.default else flag.help
    option = typer.Option(f"--{flag.name}", metavar=flag.metavar or "BOOL", help=text, show_default=False)
    return _option(_parameter(flag), Annotated[str | None, option])


def _option(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameter(flag: Flag) -> str:
    return flag.variable.lower()
