"""Tables fit the width of the terminal."""

import io

import pytest
from rich.console import Console

from qat_server.command_line import tables

COLUMNS = ("VF", "driver", "NUMA", "health")
ROWS = [("0000:6b:00.1", "vfio-pci", "-", "ok"), ("0000:6b:00.2", "4xxxvf", "0", "the kernel refused it [for] now")]


def shown(width: int, *, soft_wrap: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None, soft_wrap=soft_wrap)
    tables.show(console, "virtual functions", COLUMNS, ROWS)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_wide_terminal_has_a_table() -> None:
    title, header, first, second = shown(80)
    assert title == "virtual functions"
    assert header.split() == list(COLUMNS)
    assert first.split() == list(ROWS[0])
    assert second.endswith("the kernel refused it [for] now")


def test_long_cells_are_folded() -> None:
    lines = shown(50)
    assert lines[1].split() == list(COLUMNS)
    assert len(lines) > 4


@pytest.mark.parametrize("soft_wrap", [False, True], ids=["wraps", "soft wrap"])
@pytest.mark.parametrize("width", [20, 30, 40])
def test_a_narrow_terminal_has_paragraphs_with_every_word(width: int, soft_wrap: bool) -> None:
    lines = shown(width, soft_wrap=soft_wrap)
    assert all(len(line) <= width for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "VF 0000:6b:00.1 driver vfio-pci, health ok VF 0000:6b:00.2 driver 4xxxvf, NUMA 0, health the kernel" in text
    assert text.endswith("refused it [for] now")


def test_no_control_characters() -> None:
    assert tables.plain("a\x1b[31mb\n") == "a\ufffd[31mb\ufffd"
