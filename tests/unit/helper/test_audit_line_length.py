"""The longest line of the audit log, which bounds what a client can make the helper write."""

from pathlib import Path

from qat_helper.operations.table import NAMES
from support.longest_lines import longest_lines, longest_request

LONGEST_LINE = 1793
LONGEST_REQUEST = 2238
"""Bytes, as docs/audit.md states them. A request has two lines."""


def test_the_longest_line_of_each_operation() -> None:
    lengths = longest_lines()
    assert set(lengths) == set(NAMES) | {"Hello"}
    assert max(lengths.values()) == LONGEST_LINE, lengths
    assert longest_request() == LONGEST_REQUEST


def test_the_documentation_has_the_numbers() -> None:
    text = (Path(__file__).parents[3] / "docs/audit.md").read_text()
    assert f"A line has at most {LONGEST_LINE:,} bytes" in text
    assert f"the two lines of one request have at most {LONGEST_REQUEST:,} bytes together" in text
