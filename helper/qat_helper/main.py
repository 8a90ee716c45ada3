"""The command qat-helper: its options, the checks before it serves, and the order of start and stop."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from qat_helper.audit.copies import Copy, copier
from qat_helper.audit.log import AuditError, AuditLog, Entry, Fields, Sync
from qat_helper.console import log
from qat_helper.listening import ListenError, listening
from qat_helper.operations.kubelet import UMASK, repair_socket_directories
from qat_helper.operations.node import Node
from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy, PolicyError, narrow
from qat_helper.sandbox import close_inherited, confine, join_group
from qat_helper.serve import Server
from qat_shared import VERSION
from qat_shared.confinement import missing
from qat_shared.sysfs import SysfsError, pci_directory

_OPTIONS: Final[tuple[tuple[str, type[int | Path | Sync | Copy], str | None, str], ...]] = (
    ("sysfs-root", Path, "/sys", "sysfs mount point"),
    ("kubelet-dir", Path, "/var/lib/kubelet", "the kubelet's root directory"),
    ("socket", Path, "/run/qat-plugin/helper.sock", "Unix socket to listen on"),
    ("server-uid", int, "65532", "the only uid that may send requests"),
    ("server-gid", int, "65532", "group of the socket and of the server's endpoint directory"),
    ("audit-log", Path, "/var/log/qat-plugin/audit.jsonl", "audit log file"),
    ("audit-sync", Sync, "never", "flush to disk: never (left to the kernel) or line (after each line)"),
    ("audit-rotate", int, "65536", "start a new file after this many KiB; 0: never"),
    ("audit-copy", Copy, "auto", "also copy lines to: none, stdout, journal, auto (journal if started by systemd)"),
    ("policy", Path, None, "TOML file, owned by root, that restricts what may be requested"),
)
_SWITCHES: Final = (
    ("require-sandbox", "do not start if any layer of the sandbox is missing"),
    ("traceable", "let processes of the same user trace this one; for simulated nodes"),
)


class StartError(Exception):
    """The helper cannot run here. The message is one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Exit status: 0 after a clean stop, 2 if it could not start."""
    own, arguments = arguments is None, sys.argv[1:] if arguments is None else arguments
    if arguments[:1] and arguments[0] in ("audit", "policy"):
        from qat_helper.commands.run import run  # noqa: PLC0415  the serving process must not load these

        return run(arguments, confined=own)
    try:
        _serve(_parse(arguments))
    except (StartError, SysfsError, PolicyError, AuditError, ListenError) as error:
        log(str(error))
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
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
        if not 0 <= number < 2**32 - 1:  # -1 means "leave unchanged" to chown
            parser.error(f"argument --{name}: {number} is not a valid uid or gid")
    return options


def _serve(options: argparse.Namespace) -> None:
    close_inherited()
    root: Path = options.sysfs_root
    pci_directory(root)
    if os.geteuid() != 0 and _is_real_sysfs(root):
        raise StartError(f"{root} is a real sysfs: run the helper as root (uid 0), not as uid {os.geteuid()}")
    policy = Policy(uids=frozenset({options.server_uid}), operations=NAMES)
    if options.policy is not None:
        policy = narrow(policy, options.policy, os.geteuid())
    limit, copy = options.audit_rotate * 1024, copier(options.audit_copy)
    audit = AuditLog(options.audit_log, sync=options.audit_sync, limit=limit, copy=copy)
    join_group(options.server_gid)
    os.umask(UMASK)
    repair_socket_directories(options.kubelet_dir, options.server_gid)
    with listening(options.socket, options.server_gid) as listener:
        sandbox = confine(root, options.kubelet_dir, options.socket, options.audit_log, traceable=options.traceable)
        gaps = missing(sandbox)
        if gaps and options.require_sandbox:
            raise StartError(f"--require-sandbox is set, but the sandbox is incomplete: {gaps}")
        log(f"the sandbox is incomplete: {gaps}" if gaps else f"sandbox: {', '.join(sandbox)}")
        node = Node(
            sysfs_root=root,
            kubelet_dir=options.kubelet_dir,
            server_gid=options.server_gid,
            policy=policy,
            sandbox=sandbox,
        )
        start: Fields = {"version": VERSION, "pid": os.getpid(), "uid": os.geteuid(), "sandbox": gaps or "whole"}
        audit.enqueue(Entry(event="start", arguments=start))
        Server(listener, node, audit).run()
    audit.close()


def _is_real_sysfs(root: Path) -> bool:
    """Whether `root` is on a mounted sysfs, wherever that is mounted (proc_pid_mountinfo(5))."""
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
