"""What the pages name is there: the files and headings that they link to, paths, tests, and targets of make."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PLACES = ("*.md", "docs/**/*.md", "deployments/**/*.md", "protos/*.md")
PAGES = sorted(page.relative_to(ROOT) for place in PLACES for page in ROOT.glob(place))
FOLDERS = {each.name for each in ROOT.iterdir() if each.is_dir()}
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """As GitHub makes it: the words without marks, with dashes between."""
    words = re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)", FENCED.sub("", page.read_text()), re.MULTILINE)}


def test_there_are_pages() -> None:
    assert {"README.md", "docs/architecture.md", "deployments/README.md"} <= set(map(str, PAGES))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_each_link_leads_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"]\(([^)\s]+)\)", FENCED.sub("", (ROOT / page).read_text())):
        path, _, heading = link.partition("#")
        if "://" in path:
            continue
        target = ROOT / page.parent / path if path else ROOT / page
        if not target.exists() or (heading and heading not in anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_what_is_named_is_there(page: Path) -> None:
    text = (ROOT / page).read_text()
    paths = {path for path in re.findall(r"`([\w.-]+/[\w./-]+)`", text) if path.split("/")[0] in FOLDERS}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    tests = {file for _, _, files in os.walk(ROOT / "tests") for file in files}
    assert set(re.findall(r"\btest_\w+\.py\b", text)) <= tests
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"(?:^|`)(?:[A-Z_]+=\S+ )*make ([a-z-]+)(?=`|$|  )", text, re.MULTILINE)
    assert set(commands) <= targets


WHERE = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", (ROOT / "docs/architecture.md").read_text())


@pytest.mark.parametrize(("file", "names"), WHERE)
def test_the_architecture_page_names_functions_that_exist(file: str, names: str) -> None:
    text = (ROOT / "server/qat_server" / file).read_text()
    for name in re.findall(r"\w+", names):
        assert re.search(rf"^ *(?:async def|def|class) {name}\b|^{name}\b", text, re.MULTILINE), name


def test_the_architecture_page_says_where_to_look() -> None:
    assert len(WHERE) >= 15
