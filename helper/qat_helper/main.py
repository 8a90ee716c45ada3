"""The command qat-helper: its options, the checks before it serves, and the order of start and stop."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from qat_helper.audit.copies import Copy, copier
from qat_helper.audit.log import AuditError, AuditLog, Entry, Fields, Sync
import msgspec

from qat_helper.console import log
from qat_helper.listening import ListenError, listening
from qat_helper.operations.kubelet import UMASK, open_unprepared, repair
from qat_helper.operations.node import Node
from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy
from qat_helper.policy_file import PolicyError, narrow
from qat_helper.sandbox import close_inherited, confine, join_group
from qat_helper.serve import Server
from qat_shared import VERSION
from qat_shared.confinement import missing
from qat_shared.messages import PrepareSocketDirectory
from qat_shared.sysfs import SysfsError, pci_directory
from qat_shared.values import boolean, by_name, check_variables, integer, one_of

_PREFIX: Final = "QAT_HELPER_"
NOBODY: Final = 65534
"""The overflow uid and gid: what the kernel shows for every id that has no mapping in a user namespace."""
_SYNC: Final = partial(one_of, by_name(list(Sync)))
_COPY: Final = partial(one_of, by_name(list(Copy)))
_KIB: Final = partial(integer, minimum=0, maximum=1024 * 1024)


class StartError(Exception):
    """The helper cannot run here. The message is one sentence."""


def _id(text: str) -> int:
    number = integer(text, 0, 2**32 - 2)  # -1 means "leave unchanged" to chown
    if number == NOBODY:
        raise ValueError(f"{NOBODY} stands for every id that has no name of its own: use another")
    return number


_OPTIONS: Final[tuple[tuple[str, str, Callable[[str], object], str | None, str], ...]] = (
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
_VARIABLES: Final = {name: f"{_PREFIX}{name.replace('-', '_').upper()}" for name, *_ in _OPTIONS}


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
    for name, metavar, _, default, text in _OPTIONS:
        if metavar:
            shown_default = "" if default is None else f" (default {default})"
            parser.add_argument(f"--{name}", metavar=metavar, help=text + shown_default)
        else:
            parser.add_argument(f"--{name}", action="store_const", const="true", help=text)
    given, environment = vars(parser.parse_args(arguments)), os.environ
    known = ", ".join(_VARIABLES.values())
    try:
        check_variables(environment, _PREFIX, _VARIABLES.values(), lambda _: f"known are {known}")
    except ValueError as error:
        raise StartError(str(error)) from None
    values = argparse.Namespace()
    for name, _, parse, default, _ in _OPTIONS:
        field, variable = name.replace("-", "_"), _VARIABLES[name]
        source, written = f"--{name}", given[field]
        if written is None and variable in environment:
            source, written = variable, environment[variable]
        written = default if written is None else written
        try:
            if written == "":
                raise ValueError("the value is missing")
            setattr(values, field, None if written is None else parse(written))
        except ValueError as error:
            raise StartError(f"{source}: {error}") from None
    return values


def _serve(options: argparse.Namespace) -> None:
    close_inherited()
    root: Path = options.sysfs_root
    pci_directory(root)
    if _is_real_sysfs(root):
        if os.geteuid() != 0:
            raise StartError(f"{root} is a real sysfs: run the helper as root (uid 0), not as uid {os.geteuid()}")
        if 0 in (options.server_uid, options.server_gid):
            raise StartError("--server-uid and --server-gid: 0 is root's: give the server a uid and a group of its own")
    policy = Policy(uids=frozenset({options.server_uid}), operations=NAMES)
    if options.policy is not None:
        policy = narrow(policy, options.policy, os.geteuid())
    limit, copy = options.audit_rotate * 1024, copier(options.audit_copy)
    audit = AuditLog(options.audit_log, sync=options.audit_sync, limit=limit, copy=copy)
    join_group(options.server_gid)
    os.umask(UMASK)
    _repair_directories(options.kubelet_dir, options.server_gid, policy, audit)
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


def _repair_directories(kubelet_dir: Path, gid: int, policy: Policy, audit: AuditLog) -> None:
    """Repair the endpoint directories that the policy allows, each with a line before and one after."""
    name = PrepareSocketDirectory.__name__
    for directory in sorted(policy.directories) if name in policy.operations else ():
        if (descriptor := open_unprepared(kubelet_dir, directory, gid)) is None:
            continue
        entry = Entry(event="asked", operation=name, arguments={"directory": directory}, reason="repaired at the start")
        asked, why = audit.append(entry), ""
        try:
            repair(descriptor, gid)
        except OSError as error:  # the operation that needs it reports that
            why = os.strerror(error.errno or 0)
        finally:
            os.close(descriptor)
        result: Fields = {"message": why} if why else {}
        verdict = "failed" if why else "ok"
        audit.enqueue(msgspec.structs.replace(entry, event="done", verdict=verdict, result=result, asked=asked))


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
