"""The commands other than serving: `audit verify`, `audit show`, `policy check`. They only read files.

main.py imports this for these commands only; the serving helper loads neither it nor its imports.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from qat_helper.audit.log import AuditError
from qat_helper.commands import show, verify
from qat_helper.commands.confined import read_only
from qat_helper.commands.explain import explain
from qat_helper.console import log
from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy
from qat_helper.policy_file import PolicyError, narrow
from qat_shared.messages import AuditHead

DEFAULT_LOG: Final = Path("/var/log/qat-plugin/audit.jsonl")


def run(arguments: Sequence[str], *, confined: bool = False) -> int:
    """Run a command. Exit status: 0; 1 when a log is not intact; 2 when a log or policy cannot be read or used.

    `confined`: the process first gives up all but reading the command's files.
    """
    options = _parser().parse_args(arguments)
    if confined:
        read_only([DEFAULT_LOG.parent, *(options.file if isinstance(options.file, list) else [options.file])])
    try:
        status: int = options.call(options)
        sys.stdout.flush()
    except (AuditError, PolicyError) as error:
        log(str(error))
        return 2
    except BrokenPipeError:  # such as: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qat-helper", allow_abbrev=False)
    groups = parser.add_subparsers(required=True, metavar="audit|policy")

    audit = groups.add_parser("audit", help="read the audit log").add_subparsers(required=True, metavar="verify|show")
    verifier = audit.add_parser(
        "verify", help="check the chain: report each line that was changed, removed, inserted or moved"
    )
    verifier.add_argument(
        "file", nargs="*", type=Path, help=f"all files of one log; default: {DEFAULT_LOG} and its rotated files"
    )
    verifier.add_argument("--head", type=_head, help="a head that the server received: the log must contain that line")
    verifier.add_argument("--after", type=_head, default=verify.BEGINNING, help="the head of the files before these")
    verifier.set_defaults(call=_verify)

    shower = audit.add_parser("show", help="print one row per operation")
    shower.add_argument("file", nargs="*", type=Path, help=f"default: {DEFAULT_LOG} and its rotated files")
    shower.add_argument("--since", type=_time, help="start time, such as 2026-11-24 or 2026-11-24T08:30 (UTC)")
    shower.add_argument("--until", type=_time, help="end time, exclusive")
    shower.add_argument(
        "--device", action="append", default=[], help="PCI address; this and the next two options can be repeated"
    )
    shower.add_argument("--operation", action="append", default=[], help="such as BindDriver, or start, stop, refused")
    shower.add_argument("--verdict", action="append", default=[], help="ok, failed, denied, busy, late, interrupted...")
    shower.add_argument("--json", action="store_true", help="one JSON object a line")
    shower.set_defaults(call=_show)

    policy = groups.add_parser("policy", help="check a policy file").add_subparsers(required=True, metavar="check")
    checker = policy.add_parser("check", help="validate the file and describe what it allows")
    checker.add_argument("file", type=Path)
    checker.set_defaults(call=_check)
    return parser


def _verify(options: argparse.Namespace) -> int:
    found = _items(options.file)
    verdict = verify.verify(found, after=options.after, head=options.head)
    for fault in verdict.faults:
        _print(str(fault))
    torn = f" Fragments of failed writes: {verdict.fragments}." if verdict.fragments else ""
    if verdict.faults:
        _print(f"NOT INTACT: {_faults(len(verdict.faults))} in {verdict.lines} lines.{torn}")
        return 1
    _print(
        f"intact: {verdict.lines} lines, the head is {verdict.head.sequence}:{verdict.head.hash}{torn and '.' + torn}"
    )
    if options.head is None:
        _print("Without --head, lines cut off at the end or a rewritten log are not detected.")
    return 0


def _show(options: argparse.Namespace) -> int:
    found = _items(options.file)
    wanted = show.Filter(
        since=options.since,
        until=options.until,
        devices=frozenset(options.device),
        operations=frozenset(options.operation),
        verdicts=frozenset(options.verdict),
    )
    lines = [item for item in found if isinstance(item, verify.Line)]
    entries = list(show.entries(line.text for line in lines))
    rows = [row for row in show.rows(entries) if wanted.matches(row)]
    sys.stdout.write(show.json_lines(rows) if options.json else show.table(rows))
    if len(entries) < len(lines):
        log(f"{len(lines) - len(entries)} lines are not shown: this version cannot read them")
    first = AuditHead(sequence=lines[0].sequence - 1, hash=lines[0].previous) if lines else verify.BEGINNING
    if faults := verify.verify(found, after=first).faults:
        log(f"this log is not intact ({_faults(len(faults))}): see qat-helper audit verify")
    return 0


def _check(options: argparse.Namespace) -> int:
    path: Path = options.file
    policy = narrow(Policy(uids=frozenset(), operations=NAMES), path, os.geteuid())
    _print(f"{path} is valid.")
    if path.stat().st_uid != 0:
        _print(
            f"But it belongs to uid {path.stat().st_uid}: a helper that runs as root accepts it only if root owns it."
        )
    _print(explain(policy).removesuffix("\n"))
    return 0


def _items(paths: Sequence[Path]) -> list[verify.Item]:
    """Raises AuditError."""
    if not paths:
        older = DEFAULT_LOG.parent.glob(f"{DEFAULT_LOG.name}.*")
        paths = [*(path for path in older if path.suffix[1:].isdigit()), DEFAULT_LOG]
    contents = {}
    for path in paths:
        try:
            contents[str(path)] = path.read_bytes()
        except OSError as error:
            raise AuditError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from error
    return verify.items(contents)


def _head(text: str) -> AuditHead:
    match = re.fullmatch(r"([0-9]+):([0-9a-f]{64})", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError("a head is a line's number, a colon, and its hash of 64 hexadecimal digits")
    return AuditHead(sequence=int(match[1]), hash=match[2])


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 2026-11-24T08:30") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _faults(count: int) -> str:
    return "1 fault" if count == 1 else f"{count} faults"


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
