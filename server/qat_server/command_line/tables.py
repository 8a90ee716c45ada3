"""Tables for a terminal of any width: if the columns do not fit, each row is printed as a paragraph.

Cells are printed as text, never as markup.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console, ConsoleRenderable, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_MIN_WIDTH: Final = 12
"""The narrowest column that a longer cell is folded to: a PCI address fits on one line."""


def show(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print `rows` under `columns`. `title` may be ""."""
    console.print(_fitting(console, title, columns, rows), soft_wrap=False)


def _fitting(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> ConsoleRenderable:
    """A table; if it is too wide, for each row a line with its first cell and, below it, the other cells by column."""
    cleaned = [tuple(map(plain, row)) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *cleaned, strict=True)]
    if sum(min(width, _MIN_WIDTH) for width in widths) + 2 * (len(widths) - 1) > console.width:
        return Group(*([Text(title, "bold")] if title else []), *_paragraphs(columns, cleaned))
    table = Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, title_style="bold", header_style="dim"
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in cleaned:
        table.add_row(*map(Text, row))
    return table


def plain(text: str) -> str:
    """`text` with its control characters replaced, since it may come from another process or machine."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _paragraphs(columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Iterable[ConsoleRenderable]:
    for row in rows:
        yield Text(f"{columns[0]} {row[0]}")
        cells = [f"{column} {cell}" for column, cell in zip(columns[1:], row[1:], strict=True) if cell not in ("", "-")]
        yield Padding(Text(", ".join(cells)), (0, 0, 0, 2))
