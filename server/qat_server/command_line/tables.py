"""Tables for a terminal of any width: where the columns do not fit, each row is a paragraph instead.

Cells are text, never markup.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console, ConsoleRenderable, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_LEAST: Final = 12
"""Letters that a longer cell may be folded to: a PCI address stays whole."""


def show(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows. `title` may be ""."""
    console.print(_fitting(console, title, columns, rows), soft_wrap=False)


def _fitting(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> ConsoleRenderable:
    """A table, or else for each row a line with its first cell and, beneath it, the others with their columns."""
    held = [tuple(map(plain, row)) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *held, strict=True)]
    if sum(min(width, _LEAST) for width in widths) + 2 * (len(widths) - 1) > console.width:
        return Group(*([Text(title, "bold")] if title else []), *_paragraphs(columns, held))
    made = Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, title_style="bold", header_style="dim"
    )
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in held:
        made.add_row(*map(Text, row))
    return made


def plain(text: str) -> str:
    """Without control characters: it may come from elsewhere."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _paragraphs(columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Iterable[ConsoleRenderable]:
    for row in rows:
        yield Text(f"{columns[0]} {row[0]}")
        told = [f"{column} {cell}" for column, cell in zip(columns[1:], row[1:], strict=True) if cell not in ("", "-")]
        yield Padding(Text(", ".join(told)), (0, 0, 0, 2))
