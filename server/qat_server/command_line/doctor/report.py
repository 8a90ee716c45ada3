"""`qat-plugin doctor` from beginning to end: look, ask, judge, print."""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qat_server.command_line.doctor.ask import ask_helper, ask_server
from qat_server.command_line.doctor.checks import Finding, Level, diagnose
from qat_server.command_line.doctor.facts import Helper, read_facts
from qat_server.command_line.settings import Settings
from qat_shared.devices import PHYSICAL

_MARKS: Final = {Level.OK: ("✓", "green"), Level.NOTE: ("!", "yellow"), Level.PROBLEM: ("✗", "red")}


def run(settings: Settings, *, as_json: bool, proc: Path = Path("/proc"), dev: Path = Path("/dev")) -> int:
    """Print the findings: 0 when none is a problem, else 1. Raises SysfsError without a PCI bus."""
    logging.getLogger("qat_server").setLevel(logging.CRITICAL)  # what the helper's client would log is a finding here
    facts = read_facts(settings.sysfs_root, proc, dev, settings.socket_directory, Helper())
    pfs = [each.address for each in facts.functions if each.physical and each.driver == PHYSICAL[each.device_id].driver]
    helper = asyncio.run(ask_helper(settings.helper_socket, pfs))
    refused = ask_server(settings.socket_directory)
    findings = diagnose(msgspec.structs.replace(facts, helper=helper, refused=refused), settings)
    if as_json:
        sys.stdout.write(msgspec.json.encode(findings).decode() + "\n")
    else:
        show(findings, Console() if sys.stdout.isatty() else Console(width=160))
    return int(any(finding.level is Level.PROBLEM for finding in findings))


def show(findings: list[Finding], console: Console) -> None:
    """One line for each finding, and below it what to do."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, colour = _MARKS[finding.level]
        table.add_row(Text(mark, colour), finding.check, _printable(finding.text))
        if finding.advice:
            table.add_row("", "", Text("→ ").append_text(_printable(finding.advice)))
    console.print(table)
    problems = sum(finding.level is Level.PROBLEM for finding in findings)
    if problems:
        console.print(Text(f"{problems} problem{'s' * (problems > 1)}: see ✗ above", "red"))
    else:
        console.print(Text("nothing here keeps the plugin from its work", "green"))


def _printable(text: str) -> Text:
    return Text("".join(letter if letter.isprintable() else "\ufffd" for letter in text))
