"""What images are made of is pinned: bases by digest, Python packages by hash."""

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[3]
CONTAINERFILES: Final = sorted((ROOT / "deployments").rglob("Containerfile"))


@pytest.mark.parametrize("file", CONTAINERFILES, ids=lambda file: str(file.relative_to(ROOT / "deployments").parent))
def test_each_base_has_a_digest(file: Path) -> None:
    text = file.read_text()
    (base,) = re.findall(r"^ARG BASE=(.*)$", text, re.MULTILINE)
    assert re.fullmatch(r"docker\.io/library/[a-z]+:[a-z0-9.-]+@sha256:[0-9a-f]{64}", base), base
    assert {stage.split()[0] for stage in re.findall(r"^FROM (.*)$", text, re.MULTILINE)} == {"${BASE}", "scratch"}
    assert not re.findall(r"^ADD .*https?:|curl|wget", text, re.MULTILINE), "nothing else is fetched"


@pytest.mark.parametrize("file", CONTAINERFILES, ids=lambda file: str(file.relative_to(ROOT / "deployments").parent))
def test_each_python_package_has_a_hash_or_is_built_here(file: Path) -> None:
    commands = re.sub(r"\\\n\s*", "", file.read_text())
    installs = re.findall(r"pip\S* (?:--python \S+ )?install ([^&\n]*)", commands)
    assert bool(installs) == ("images/" in str(file.relative_to(ROOT)) and "python3" in commands and "pip" in commands)
    for options in installs:
        assert "--require-hashes" in options or "--no-index" in options, options


def test_there_are_images() -> None:
    assert len(CONTAINERFILES) == 4
