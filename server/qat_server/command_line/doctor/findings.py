"""Findings: their severity, and their form on a terminal."""

from enum import StrEnum
from typing import Final

from msgspec import Struct
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qat_server.command_line import tables


class Level(StrEnum):
    """The severity of a finding. Only problems prevent the plugin from working."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


class Finding(Struct, frozen=True):
    """The result of a check: `check` is its topic, `text` the finding, `advice` the action to take, or "" for none."""

    check: str
    level: Level
    text: str
    advice: str = ""


_MARKS: Final = {Level.OK: ("✓", "green"), Level.NOTE: ("!", "yellow"), Level.PROBLEM: ("✗", "red")}


def show(findings: list[Finding], console: Console) -> None:
    """Print one line for each finding, with its advice below."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, colour = _MARKS[finding.level]
        table.add_row(Text(mark, colour), finding.check, Text(tables.plain(finding.text)))
        if finding.advice:
            table.add_row("", "", Text(f"→ {tables.plain(finding.advice)}"))
    console.print(table)
    problems = sum(finding.level is Level.PROBLEM for finding in findings)
    if problems:
        console.print(Text(f"{problems} problem{'s' * (problems > 1)}: see ✗ above", "red"))
    else:
        console.print(Text("found nothing that prevents the plugin from working", "green"))
