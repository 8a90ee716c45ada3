"""The helper's options and their environment variables: one table has the parser, default and help of each."""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from qat_helper.audit.copies import Copy
from qat_helper.audit.log import Sync
from qat_shared import VERSION
from qat_shared.values import boolean, by_name, check_variables, integer, one_of

_PREFIX: Final = "QAT_HELPER_"
_NOBODY: Final = 65534
"""The overflow uid and gid: what the kernel shows for every id that has no mapping in a user namespace."""
_SYNC: Final = partial(one_of, by_name(list(Sync)))
_COPY: Final = partial(one_of, by_name(list(Copy)))
_KIB: Final = partial(integer, minimum=0, maximum=1024 * 1024)


class OptionError(Exception):
    """An option or a variable is unknown or wrong. The message is one sentence that names it."""


def _id(text: str) -> int:
    number = integer(text, 0, 2**32 - 2)  # -1 means "leave unchanged" to chown
    if number == _NOBODY:
        raise ValueError(f"{_NOBODY} stands for every id that has no name of its own: use another")
    return number


OPTIONS: Final[tuple[tuple[str, str, Callable[[str], object], str | None, str], ...]] = (
    ("sysfs-root", "PATH", Path, "/sys", "sysfs mount point"),
    ("kubelet-dir", "PATH", Path, "/var/lib/kubelet", "the kubelet's root directory"),
    ("socket", "PATH", Path, "/run/qat-plugin/helper.sock", "Unix socket to listen on"),
    ("server-uid", "UID", _id, "65532", "the only uid that may send requests"),
    ("server-gid", "GID", _id, "65532", "group of the socket and of the server's endpoint directory"),
    ("audit-log", "PATH", Path, "/var/log/qat-plugin/audit.jsonl", "audit log file"),
    ("audit-sync", "WHEN", _SYNC, "never", "flush to disk: never (left to the kernel) or line (after each line)"),
    ("audit-rotate", "KIB", _KIB, "65536", "start a new file after this many KiB; 0: never"),
    (
        "audit-copy",
        "WHERE",
        _COPY,
        "auto",
        "copy lines to: none, stdout, journal, auto (journal if started by systemd)",
    ),
    ("policy", "PATH", Path, None, "root's TOML file, or directory of them, that restricts what may be requested"),
    ("require-sandbox", "", boolean, "false", "do not start if any layer of the sandbox is missing"),
    ("traceable", "", boolean, "false", "let processes of the same user trace this one; for simulated nodes"),
)
"""Name, metavar ("" for a switch), parser, default and help. A parser raises ValueError with one sentence."""
VARIABLES: Final = {name: f"{_PREFIX}{name.replace('-', '_').upper()}" for name, *_ in OPTIONS}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The value of each option, in a field of its name with underscores. Raises OptionError.

    An unknown option or --help ends the process, as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog="qat-helper",
        description="The root process of qat-plugin: performs a fixed set of audited operations for the server.",
        usage="%(prog)s [options]\n       %(prog)s audit verify|show ...\n       %(prog)s policy check FILE",
        epilog="Each option can also be set in the environment: --sysfs-root as QAT_HELPER_SYSFS_ROOT, and so on.",
        allow_abbrev=False,
        # argparse imports shutil to find the terminal's width, and shutil imports three libraries that unpack archives.
        formatter_class=partial(argparse.HelpFormatter, width=110),
    )
    parser.add_argument("--version", action="version", version=f"qat-helper {VERSION}")
    for name, metavar, _, default, text in OPTIONS:
        if metavar:
            shown_default = "" if default is None else f" (default {default})"
            parser.add_argument(f"--{name}", metavar=metavar, help=text + shown_default)
        else:
            parser.add_argument(f"--{name}", action="store_const", const="true", help=text)
    given, environment = vars(parser.parse_args(arguments)), os.environ
    known = ", ".join(VARIABLES.values())
    try:
        check_variables(environment, _PREFIX, VARIABLES.values(), lambda _: f"known are {known}")
    except ValueError as error:
        raise OptionError(str(error)) from None
    values = argparse.Namespace()
    for name, _, parse, default, _ in OPTIONS:
        field, variable = name.replace("-", "_"), VARIABLES[name]
        source, written = f"--{name}", given[field]
        if written is None and variable in environment:
            source, written = variable, environment[variable]
        written = default if written is None else written
        try:
            if written == "":
                raise ValueError("the value is missing")
            setattr(values, field, None if written is None else parse(written))
        except ValueError as error:
            raise OptionError(f"{source}: {error}") from None
    return values
