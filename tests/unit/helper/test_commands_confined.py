"""The commands that read give up everything else before they parse a file."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat_helper.main import main

PROBE = """
import json, os, signal, socket, sys, threading
from pathlib import Path
from qat_helper import main
from qat_helper.commands import run
outside = Path(os.environ["OUTSIDE"])
acts = {
    "read its file": lambda: Path(sys.argv[-1]).read_bytes(),
    "read another file": lambda: (outside / "there").read_text(),
    "list a directory": lambda: os.listdir(outside),
    "write its file": lambda: os.close(os.open(sys.argv[-1], os.O_WRONLY)),
    "shorten its file": lambda: os.truncate(sys.argv[-1], 0),
    "change its file's times": lambda: os.utime(sys.argv[-1]),
    "make a file": lambda: (outside / "new").write_text(""),
    "open a socket": lambda: socket.socket(socket.AF_UNIX),
    "change a mode": lambda: os.chmod(outside / "there", 0o4755),
    "remove a file": lambda: (outside / "there").unlink(),
    "signal a process": lambda: os.kill(os.getppid(), 0),
    "signal a thread": lambda: signal.pthread_kill(threading.get_ident(), 0),
    "signal by a descriptor": lambda: signal.pidfd_send_signal(parent, 0),
    "start a program": lambda: os.execv("/bin/true", ["true"]),
}
parent = os.pidfd_open(os.getppid())
def attempt(act):
    try:
        act()
    except OSError as error:
        return error.errno
    return 0
def probe(options):
    print(json.dumps({name: attempt(act) for name, act in acts.items()}))
    return 0
run._verify = run._show = run._check = probe
CONTROL
sys.exit(main.main())
"""
CONTROL = "run.read_only = lambda paths: None"
WITHOUT_THE_PROGRAM = f"{CONTROL}; del acts['start a program']"


def answers(tmp_path: Path, words: list[str], control: str = "") -> dict[str, int]:
    outside = tmp_path / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "there").write_text("untouched")
    (tmp_path / "given").write_text("")
    command = [sys.executable, "-c", PROBE.replace("CONTROL", control), *words, str(tmp_path / "given")]
    done = subprocess.run(command, env=os.environ | {"OUTSIDE": str(outside)}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        return {}
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("words", [["audit", "verify"], ["audit", "show"], ["policy", "check"]], ids=" ".join)
def test_a_command_can_only_read_its_files(tmp_path: Path, words: list[str]) -> None:
    found = answers(tmp_path, words)
    assert found.pop("read its file") == 0
    assert {name for name, number in found.items() if number not in (errno.EACCES, errno.EPERM)} == set()
    assert (tmp_path / "outside/there").read_text() == "untouched"


def test_without_that_it_could_do_more(tmp_path: Path) -> None:
    found = answers(tmp_path, ["audit", "verify"], WITHOUT_THE_PROGRAM)
    assert len(found) > 10
    assert set(found.values()) == {0}
    assert not (tmp_path / "outside/there").exists()
    assert answers(tmp_path, ["audit", "verify"], CONTROL) == {}, "it became another program"


def test_a_caller_in_the_same_process_is_not_confined(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(tmp_path / "missing.toml")]) == 2
    assert "missing.toml" in capfd.readouterr().err
    (tmp_path / "still").write_text("writable")
