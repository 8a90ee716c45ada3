"""The command qat-helper: the checks before it serves, and the order of start and stop."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import msgspec

from qat_helper.audit.copies import copier
from qat_helper.audit.log import AuditError, AuditLog, Entry, Fields
from qat_helper.console import log
from qat_helper.listening import ListenError, listening
from qat_helper.operations.kubelet import UMASK, open_unprepared, repair
from qat_helper.operations.node import Node
from qat_helper.operations.table import NAMES
from qat_helper.options import OptionError, parse
from qat_helper.policy import Policy
from qat_helper.policy_file import PolicyError, narrow
from qat_helper.sandbox import close_inherited, confine, join_group
from qat_helper.serve import Server
from qat_shared import VERSION
from qat_shared.confinement import missing
from qat_shared.messages import PrepareSocketDirectory
from qat_shared.sysfs import SysfsError, pci_directory


class StartError(Exception):
    """The helper cannot run here. The message is one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Exit status: 0 after a clean stop, 2 if it could not start."""
    own, arguments = arguments is None, sys.argv[1:] if arguments is None else arguments
    if arguments[:1] and arguments[0] in ("audit", "policy"):
        from qat_helper.commands.run import run  # noqa: PLC0415  the serving process must not load these

        return run(arguments, confined=own)
    try:
        _serve(parse(arguments))
    except (OptionError, StartError, SysfsError, PolicyError, AuditError, ListenError) as error:
        log(str(error))
        return 2
    return 0


def _serve(options: Namespace) -> None:
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
