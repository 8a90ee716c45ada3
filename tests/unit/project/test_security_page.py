"""SECURITY.md names the tests that hold its promises: each of them is there, and so is each promise's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "SECURITY.md").read_text()
PROMISES = dict(re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^## )", PAGE, re.MULTILINE | re.DOTALL))
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize(("path", "name"), TEST.findall(PAGE))
def test_a_named_test_exists(path: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_each_promise_names_its_tests() -> None:
    assert list(PROMISES) == [str(number) for number in range(1, len(PROMISES) + 1)]
    assert len(PROMISES) >= 12
    for number, promise in PROMISES.items():
        assert TEST.findall(promise), f"promise {number} is only a wish"


def test_each_file_of_the_suite_is_named() -> None:
    """A new one belongs to a promise."""
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests/helper_security").glob("test_*.py")}
    assert files <= {path for path, _ in TEST.findall(PAGE)}
