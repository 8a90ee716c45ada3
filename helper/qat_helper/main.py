"""The command qat-helper: its options, the checks before it serves, and the order of starting and ending."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from qat_helper.audit import AuditError, AuditLog, Entry, Fields, Sync
from qat_helper.console import log
from qat_helper.copies import Copy, copier
from qat_helper.listening import ListenError, listening
from qat_helper.node import Node
from qat_helper.operations import NAMES
from qat_helper.policy import Policy, PolicyError, narrow
from qat_helper.sandbox import close_inherited, confine, join_group
from qat_helper.serve import Server
from qat_shared import VERSION
from qat_shared.confinement import missing
from qat_shared.sysfs import SysfsError, pci_directory

_OPTIONS: Final[tuple[tuple[str, type[int | Path | Sync | Copy], str | None, str], ...]] = (
    ("sysfs-root", Path, "/sys", "the sysfs tree to work on"),
    ("kubelet-dir", Path, "/var/lib/kubelet", "the kubelet's directory"),
    ("socket", Path, "/run/qat-plugin/helper.sock", "the socket to serve on"),
    ("server-uid", int, "65532", "the only uid that may ask"),
    ("server-gid", int, "65532", "the group that the socket and the endpoints' directory are given to"),
    ("audit-log", Path, "/var/log/qat-plugin/audit.jsonl", "the log of what is done"),
    ("audit-sync", Sync, "never", "when a line is on the disk: never (when the kernel likes), line (at once)"),
    ("audit-rotate", int, "65536", "begin a new file after so many KiB, 0: never"),
    ("audit-copy", Copy, "auto", "copy lines to: none, stdout, journal, auto (journal if started by systemd)"),
    ("policy", Path, None, "a TOML file of root's that narrows what may be asked"),
)
_SWITCHES: Final = (
    ("require-sandbox", "do not start when any part of the sandbox is missing"),
    ("traceable", "let processes of the same user look into this one: for simulated nodes"),
)


class StartError(Exception):
    """The helper cannot work here: one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. The exit status: 0 after a clean end, 2 if it could not begin."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] and arguments[0] in ("audit", "policy"):
        from qat_helper.commands import run  # noqa: PLC0415  what serves as root is to have none of it

        return run(arguments)
    try:
        _serve(_parse(arguments))
    except (StartError, SysfsError, PolicyError, AuditError, ListenError) as error:
        log(str(error))
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="qat-helper",
        description="Does for qat-plugin what only root may: a fixed set of audited operations.",
        usage="%(prog)s [options]\n       %(prog)s audit verify|show ...\n       %(prog)s policy check FILE",
        epilog="Each option may also be given in the environment: QAT_HELPER_SYSFS_ROOT for --sysfs-root, and so on.",
        allow_abbrev=False,
        # To find a width out, argparse would import shutil, and with that three libraries that unpack archives.
        formatter_class=partial(argparse.HelpFormatter, width=110),
    )
    parser.add_argument("--version", action="version", version=f"qat-helper {VERSION}")
    for name, kind, default, text in _OPTIONS:
        variable = f"QAT_HELPER_{name.replace('-', '_').upper()}"
        chosen = os.environ.get(variable, default)
        default_text = "" if default is None else f" (default {default})"
        parser.add_argument(
            f"--{name}", type=kind, default=chosen, help=text + default_text, metavar=kind.__name__.upper()
        )
    for name, text in _SWITCHES:
        given = os.environ.get(f"QAT_HELPER_{name.replace('-', '_').upper()}") in ("1", "true")
        parser.add_argument(f"--{name}", action="store_true", default=given, help=text)
    options = parser.parse_args(arguments)
    for name, number in (("server-uid", options.server_uid), ("server-gid", options.server_gid)):
        if not 0 <= number < 2**32 - 1:  # -1 is chown's "leave it as it is"
            parser.error(f"argument --{name}: {number} is no user's or group's number")
    return options


def _serve(options: argparse.Namespace) -> None:
    close_inherited()
    root: Path = options.sysfs_root
    pci_directory(root)
    if os.geteuid() != 0 and _is_real_sysfs(root):
        raise StartError(f"on the real sysfs at {root} the helper must run as root (uid 0), not as uid {os.geteuid()}")
    policy = Policy(uids=frozenset({options.server_uid}), operations=NAMES)
    if options.policy is not None:
        policy = narrow(policy, options.policy, os.geteuid())
    limit, copy = options.audit_rotate * 1024, copier(options.audit_copy)
    audit = AuditLog(options.audit_log, sync=options.audit_sync, limit=limit, copy=copy)
    join_group(options.server_gid)
    with listening(options.socket, options.server_gid) as listener:
        sandbox = confine(root, options.kubelet_dir, options.socket, options.audit_log, traceable=options.traceable)
        lacks = missing(sandbox)
        if lacks and options.require_sandbox:
            raise StartError(f"--require-sandbox, and the sandbox is not whole: {lacks}")
        log(f"the sandbox is not whole: {lacks}" if lacks else f"sandbox: {', '.join(sandbox)}")
        node = Node(
            sysfs_root=root,
            kubelet_dir=options.kubelet_dir,
            server_gid=options.server_gid,
            policy=policy,
            sandbox=sandbox,
        )
        facts: Fields = {"version": VERSION, "pid": os.getpid(), "uid": os.geteuid(), "sandbox": lacks or "whole"}
        audit.enqueue(Entry(event="start", arguments=facts))
        Server(listener, node, audit).run()
    audit.close()


def _is_real_sysfs(root: Path) -> bool:
    """Whether the kernel's own sysfs is mounted there, wherever that is (proc(5), mountinfo)."""
    device = root.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError as error:
        raise StartError(
            f"/proc/self/mountinfo cannot be read ({os.strerror(error.errno or 0)}): mount /proc"
        ) from error
    return any(line.split()[2] == number and line.partition(" - ")[2].split()[:1] == ["sysfs"] for line in lines)


if __name__ == "__main__":
    sys.exit(main())
