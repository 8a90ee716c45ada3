"""The `doctor` command: its options, which are flags of the server."""

import os
from typing import Final

import typer

from qat_server.command_line.flags import SERVER_FLAGS, from_environment
from qat_server.command_line.options import given_flags, with_options
from qat_server.command_line.settings import check_sysfs_root, parse

_NAMES: Final = frozenset(
    {"dpdk-driver", "kernel-vf-drivers", "sysfs-root", "kubelet-dir", "helper-socket", "registration"}
)
_FLAGS: Final = tuple(flag for flag in SERVER_FLAGS if flag.name in _NAMES)


@with_options(_FLAGS, {"json": "print the findings as JSON"})
def doctor(**arguments: str | bool | None) -> None:
    """Check this node or VM and suggest fixes. Pass the server's own flags, and run it as the server's user.

    Exit status: 0 if nothing prevents the plugin from working, else 1.
    """
    settings = parse(given_flags(_FLAGS, arguments), from_environment(os.environ))
    check_sysfs_root(settings.sysfs_root)
    from qat_server.command_line.doctor import diagnosis  # noqa: PLC0415 - only this command needs it

    raise typer.Exit(diagnosis.run(settings, as_json=bool(arguments["json"])))
