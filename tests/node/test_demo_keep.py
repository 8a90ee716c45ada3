"""`qat-plugin demo --keep`: it restarts processes that end, carries out commands, and leaves nothing behind."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PF = "0000:6b:00.0"
NODE = {"pfs": [{"address": PF, "services": "sym;asym", "total_vfs": 4}]}


WITH_LONG_LIMIT = """
from qat_server import main
from qat_simulation.demo import sequence
sequence.LIMIT = 600.0
main.main()
"""
"""qat-plugin, with a long time limit for the demo on busy machines."""


class Kept:
    """A demo that keeps running. A thread reads its output."""

    def __init__(self, directory: Path) -> None:
        file = directory / "node.json"
        file.write_text(json.dumps(NODE))
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITH_LONG_LIMIT, "demo", "--keep", "--node", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self.seen: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)

    def until(self, pattern: str) -> "re.Match[str]":
        """The match in the next line that contains the pattern."""
        deadline = time.monotonic() + 120
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{pattern!r} did not come after\n{''.join(self.seen)}") from None
            self.seen.append(line)
            if found := re.search(pattern, line):
                return found

    def command(self, line: str, result: str) -> "re.Match[str]":
        """Write a command into the FIFO, as a shell's echo does, and wait for its result."""
        with open(self.node / "control", "w") as control:
            control.write(f"{line}\n")
        return self.until(result)

    @property
    def node(self) -> Path:
        """The node's directory."""
        found = re.search(r"The node keeps running in (\S+)", "".join(self.seen))
        assert found
        return Path(found[1])


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    demo = Kept(tmp_path)
    try:
        demo.until(r"echo help > .*/control")
        yield demo
    finally:
        if demo.process.poll() is None:
            demo.process.send_signal(signal.SIGINT)
            demo.process.wait(120)
        demo.reader.join(120)


def test_processes_are_restarted_and_commands_carried_out(kept: Kept) -> None:
    for name in ("helper", "server"):
        kept.command(f"kill {name}", f"> SIGKILL to the {name}")
        kept.until(f"the {name} ended with status -9: restarting it")
        kept.until(f"> the {name} runs again, pid")
    kept.command("free pod-a", "> pod-a has ended")
    kept.command("kubelet restart", "> the kubelet runs")
    kept.command("kubelet restart now", "> usage: kubelet stop|start|restart".replace("|", r"\|"))
    kept.command("reboot", "> unknown command 'reboot': help lists")
    kept.command("unplug 0000:99:00.1", "> unplug 0000:99:00.1: No such device")
    kept.command("close 0000:6b:00.1", "> 0000:6b:00.1 was not opened here")
    kept.command("open 0000:6b:00.1", "> 0000:6b:00.1 is open")
    kept.command("close 0000:6b:00.1", "> 0000:6b:00.1 is closed")
    kept.command(
        "pod p qat.intel.com/none 1", "> the kubelet has no resource 'qat.intel.com/none'; it has qat.intel.com/cy"
    )
    while True:  # until the restarted server has registered
        result = kept.command("pod p qat.intel.com/cy 1", "> (p got 0000:6b:00|pod p .*)")[1]
        if result.startswith("p got"):
            break
    kept.command("pod q qat.intel.com/cy 9", "> pod q qat.intel.com/cy 9: ")
    kept.command(f"heartbeat {PF} 7", "> a heartbeat is 0 .* or -1")
    kept.command(f"services {PF} dc", "> .*/qat.toml sets services dc for")
    kept.command("help", "> one command on each line:")
    assert kept.process.poll() is None
    node = kept.node
    kept.process.send_signal(signal.SIGINT)
    kept.until("^removed$")
    assert kept.process.wait(120) == 0
    assert not node.exists()


def test_a_lost_heartbeat_shows_in_the_status(kept: Kept) -> None:
    kept.command(f"heartbeat {PF} -1", f"> the firmware of {PF} does not answer any more")
    found = re.search(r"(\S+) status --kubelet-dir (\S+)", "".join(kept.seen))
    assert found
    program, directory = found.groups()
    assert os.access(program, os.X_OK), "the printed command works in any directory"
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run([program, "status", "-kubelet-dir", directory, "--json"], capture_output=True, check=True)
        if all(vf["reason"] for vf in json.loads(done.stdout)["vfs"]):
            return
        assert time.monotonic() < deadline, done.stdout
        time.sleep(0.05)
