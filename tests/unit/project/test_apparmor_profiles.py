"""The AppArmor profiles: the parser takes them, and they grant no more than the other layers do."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROFILES = ("qat-helper", "qat-server")
FOLDER = Path(__file__).parents[3] / "apparmor"
PARSER = shutil.which("apparmor_parser") or shutil.which("/usr/sbin/apparmor_parser") or "/sbin/apparmor_parser"


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.skipif(shutil.which(PARSER) is None, reason="apparmor_parser (Debian: apparmor) is not installed")
def test_the_parser_takes_it(name: str) -> None:
    # Read and compiled, neither loaded into the kernel nor kept in a cache.
    done = subprocess.run([PARSER, "-Q", "-K", str(FOLDER / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr


@pytest.mark.skipif(shutil.which(PARSER) is None, reason="apparmor_parser (Debian: apparmor) is not installed")
def test_the_parser_would_refuse_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text((FOLDER / "qat-helper").read_text().replace("deny ptrace,", "capability not_one,"))
    assert subprocess.run([PARSER, "-Q", "-K", str(wrong)], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("name", PROFILES)
def test_no_capability_and_no_write_beyond_what_is_meant(name: str) -> None:
    lines = [line.strip() for line in (FOLDER / name).read_text().splitlines()]
    rules = [line for line in lines if line and not line.startswith(("#", "deny "))]
    assert not [rule for rule in rules if rule.startswith(("capability", "mount", "ptrace", "change_profile"))]
    written = [rule for rule in rules if re.search(r" r?w?[wa]k?,$", rule) and rule.startswith(("/", "@", "owner"))]
    sysfs = [rule for rule in written if rule.startswith("@{sys}")]
    assert bool(sysfs) == (name == "qat-helper")
    assert not [rule for rule in sysfs if rule.endswith("** w,")], "attributes by name"
    network = [rule for rule in rules if rule.startswith("network")]
    assert bool(network) == (name == "qat-server")
