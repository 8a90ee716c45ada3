"""Both programs in containers whose runtime (runc) applies our profiles, like a kubelet's Localhost profiles."""

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.conditions import wait_until
from support.helper_process import COMMAND, Helper, helper

SECCOMP = Path(__file__).parents[2] / "seccomp"
NONE: list[str] = []


class Container:
    """A container with this machine's files and no capabilities; `profile` None: no filter."""

    def __init__(self, directory: Path, profile: Path | None) -> None:
        self.directory = directory
        self.identity = f"qat-{secrets.token_hex(6)}"
        (directory / "rootfs").mkdir(parents=True)
        self._mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}]
        for entry in sorted(Path("/").iterdir()):
            if entry.is_symlink():
                (directory / "rootfs" / entry.name).symlink_to(entry.readlink())
            elif entry.is_dir() and entry.name != "proc":
                mount = {"destination": str(entry), "type": "bind", "source": str(entry), "options": ["rbind"]}
                self._mounts.append(mount)  # type: ignore[arg-type]
        self._process: subprocess.Popen[bytes] | None = None
        self._seccomp = None if profile is None else json.loads(profile.read_text())

    def start(self, arguments: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        linux: dict[str, Any] = {"namespaces": [{"type": "mount"}, {"type": "pid"}]}
        if self._seccomp is not None:
            linux["seccomp"] = self._seccomp
        process = {
            "user": {"uid": 0, "gid": 0},
            "args": list(arguments),
            "env": [f"PATH={os.environ['PATH']}"],
            "cwd": "/",
            "capabilities": {"bounding": NONE, "effective": NONE, "permitted": NONE},
            "noNewPrivileges": True,
        }
        config = {"ociVersion": "1.0.2", "process": process, "root": {"path": "rootfs"}, "mounts": self._mounts}
        (self.directory / "config.json").write_text(json.dumps(config | {"linux": linux}))
        with log.open("ab") as output:
            command = self._runc("run", self.identity)
            self._process = subprocess.Popen(command, cwd=self.directory, stdout=output, stderr=output)
        return self._process

    def remove(self) -> None:
        subprocess.run(self._runc("delete", "-f", self.identity), capture_output=True, check=False)
        if self._process is not None:
            self._process.wait(60)

    def _runc(self, *words: str) -> list[str]:
        return ["runc", "--root", str(self.directory / "state"), *words]


def why_not() -> str:
    """Why no container can be started here, "" when one can."""
    if os.geteuid() != 0 or shutil.which("runc") is None:
        return "needs root and runc"
    with helper(start=False) as place:
        container = Container(place.directory / "trial", None)
        try:
            status = container.start(["/bin/true"], place.log).wait(60)
        finally:
            container.remove()
        return f"runc cannot start a container here: {place.log_text()}" if status else ""


@pytest.fixture(scope="module")
def runc() -> None:
    if why := why_not():
        pytest.skip(why)


def filters(running: Helper, program: str) -> int:
    """The number of seccomp filters of the program in the container."""
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes()
            if program.encode() in command and str(running.directory).encode() in command and b"runc" not in command:
                return int((process / "status").read_text().partition("Seccomp_filters:")[2].split()[0])
        except OSError:
            continue
    return 0


@pytest.mark.usefixtures("runc")
def test_both_start_and_serve_beneath_their_profiles() -> None:
    with helper(start=False) as running:
        log = running.directory / "server.log"
        first = Container(running.directory / "first", SECCOMP / "qat-helper.json")
        second = Container(running.directory / "second", SECCOMP / "qat-server.json")
        try:
            first.start([COMMAND, *running.options(), "--require-sandbox"], running.log)
            wait_until(lambda: "serving on" in running.log_text())
            options = [
                "--allow-root",
                "--require-sandbox",
                f"--sysfs-root={running.directory / 'sys'}",
                f"--kubelet-dir={running.directory / 'kubelet'}",
                f"--helper-socket={running.socket}",
                "--metrics-address=127.0.0.1:0",
            ]
            second.start([COMMAND.replace("qat-helper", "qat-plugin"), *options], log)
            wait_until(
                lambda: "VF not bound" in log.read_text(), 60
            )  # there is no driver here: the request was sent and answered
            said = log.read_text()
            assert "sandbox entered" in said
            assert "helper connected" in said
            assert "status endpoint open" in said
            assert "no uevents" not in said
            for program in ("qat-helper", "qat-plugin"):
                assert filters(running, program) == 2, "the runtime's and its own"
        finally:
            first.remove()
            second.remove()


@pytest.mark.usefixtures("runc")
def test_a_profile_that_lacks_what_a_start_needs_would_be_noticed() -> None:
    with helper(start=False) as running:
        profile = json.loads((SECCOMP / "qat-helper.json").read_text())
        profile["syscalls"] = [rule for rule in profile["syscalls"] if rule.get("comment") != "start"]
        poor = running.directory / "poor.json"
        poor.write_text(json.dumps(profile))
        container = Container(running.directory / "poor", poor)
        try:
            assert container.start([COMMAND, *running.options()], running.log).wait(60) != 0
        finally:
            container.remove()
        assert "serving on" not in running.log_text()
