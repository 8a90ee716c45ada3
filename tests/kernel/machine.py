"""One guest: QEMU with a kernel of Debian's, this machine's own root, and pytest in it.

Results come back as pytest's own reports, a line of JSON each, in a directory that host and guest share. What the guest
printed to its console is there too, and is what is shown when it does not start, hangs or crashes.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
BUILD: Final = HERE / "build"
PROJECT: Final = HERE.parent.parent

BOOT_LIMIT: Final = 1200.0
"""Seconds until the first test has begun: it takes 20 on an idle machine, and machines are shared."""
SILENCE_LIMIT: Final = 1200.0
"""Seconds that one test may take: software emulation is slow, and its speed changes."""
END_LIMIT: Final = 60.0
MEMORY: Final = 3072
"""MiB."""

IOMMU: Final = (
    "-device",
    "intel-iommu,intremap=on,caching-mode=on",
    # QEMU's IOMMU serves only the buses that firmware tables list: with this port, all that there can be.
    "-device",
    "pcie-root-port,id=all,slot=9,bus=pcie.0,bus-reserve=253",
)


class GuestError(Exception):
    """The guest did not do what it should: one sentence, and the end of its console."""


def why_not() -> str:
    """Why there can be no guest here, "" if there can."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the guest is an x86_64 machine on Linux, this is not one"
    if shutil.which("qemu-system-x86_64") is None:
        return "QEMU (qemu-system-x86_64) is not installed: make test-kernel installs it where apt-get is"
    if os.geteuid() != 0:
        return "needs root: the guest's root is this machine's, and so are its files' owners"
    return ""


def room_for(guests: int) -> bool:
    """Whether so many can run beside each other: there is memory for all, and nobody else keeps the processors busy."""
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    processors = os.cpu_count() or 1
    idle = processors > 1 and os.getloadavg()[0] < 2 * processors
    return idle and int(free.split()[1]) // 1024 > guests * (MEMORY + 512)


def qemu(directory: Path, iommu: bool = True, memory: int = MEMORY, words: Sequence[str] = ()) -> list[str]:
    """The command for a guest that shares `directory`: `memory` in MiB, `words` for the kernel's command line."""
    kernel = (BUILD / "kernel").read_text().strip()
    image = BUILD / "image"
    line = [
        *("console=ttyS0", "panic=-1", "oops=panic", "loglevel=5", "random.trust_cpu=on", "rdinit=/init"),
        # The kernel's own check counts ticks in real time, and panics on a busy host.
        "no_timer_check",
        f"qat.project={PROJECT}",
        f"qat.modules={image}/lib/modules/{kernel}",
        *(("intel_iommu=on",) if iommu else ()),
        *words,
    ]
    share = "local,security_model=none,multidevs=remap"
    half = f"size={memory // 2}M"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-smp", "2", "-m", f"{memory}M"),
        # Two NUMA nodes with a processor each.
        *("-object", f"memory-backend-ram,id=m0,{half}", "-numa", "node,nodeid=0,cpus=0,memdev=m0"),
        *("-object", f"memory-backend-ram,id=m1,{half}", "-numa", "node,nodeid=1,cpus=1,memdev=m1"),
        *(IOMMU if iommu else ()),
        *("-kernel", str(image / "boot" / f"vmlinuz-{kernel}"), "-initrd", str(BUILD / "initramfs")),
        *("-append", " ".join(line)),
        *("-serial", f"file:{directory / 'console'}"),
        *("-virtfs", f"{share},path=/,mount_tag=host,readonly=on"),
        *("-virtfs", f"{share},path={directory},mount_tag=results"),
        # Python and OpenSSL ask for random numbers at their start; a young guest has none.
        *("-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random"),
    ]


class Guest:
    """A guest that runs these tests, in this order, then ends. `kind`: with or without an "iommu"."""

    def __init__(self, kind: str, tests: Sequence[str], options: Sequence[str] = ()) -> None:
        self.kind = kind
        self._tests = tuple(tests)
        self._shared = tempfile.TemporaryDirectory(prefix="qat-guest-")
        self.directory = Path(self._shared.name)
        (self.directory / "arguments").write_text("\n".join([*options, *tests]) + "\n")
        variables = {
            "PROJECT": str(PROJECT),
            "PYTHON": sys.executable,
            "QAT_GUEST": "/run/host",
            "QAT_GUEST_KIND": kind,
            "QAT_EVERY_SCENARIO": os.environ.get("QAT_EVERY_SCENARIO", ""),
        }
        text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        (self.directory / "environment").write_text(text)
        for name in ("reports.jsonl", "console", "output"):
            (self.directory / name).touch()
        self._began = time.monotonic()
        self._heard = self._began
        self._seen: dict[str, list[Any]] = {}
        self._finished: set[str] = set()
        self._started = False
        self._offset = 0
        self._rest = b""
        self._log = (self.directory / "qemu.log").open("wb")
        self.process = subprocess.Popen(
            [*qemu(self.directory, kind == "iommu"), "-no-reboot"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def reports(self, test: str, beside: Sequence["Guest"] = ()) -> Iterator[Mapping[str, Any]]:
        """The serialized reports of a test, as they come. Raises GuestError when they do not.

        `beside`: guests that run meanwhile, to be listened to.
        """
        given = 0
        while True:
            for each in (self, *beside):
                each._read()
            found = self._seen.get(test, [])
            yield from found[given:]
            given = len(found)
            if test in self._finished:
                return
            self._check(test)
            time.sleep(0.05)

    def _check(self, test: str) -> None:
        waited = time.monotonic() - self._heard
        if self.process.poll() is not None or (self.directory / "status").exists():
            self._read()  # what it wrote between our last look and its end
            if test in self._finished:
                return
            raise GuestError(f"the guest ended before this test was done\n{self.tail()}")
        if waited > (SILENCE_LIMIT if self._started else BOOT_LIMIT):
            what = "no test has ended" if self._started else "no test has begun"
            self.end(0)
            raise GuestError(f"{what} for {waited:.0f} s\n{self.tail()}")

    def _read(self) -> None:
        with (self.directory / "reports.jsonl").open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            record = json.loads(line)
            self._heard = time.monotonic()
            if not self._started:
                self._started = True
                self.boot_seconds = self._heard - self._began
            if "finished" in record:
                self._finished.add(record["finished"])
            elif "report" in record:
                self._seen.setdefault(record["report"]["nodeid"], []).append(record["report"])

    def tail(self, lines: int = 40) -> str:
        """The ends of what QEMU, the guest's console and its pytest have printed."""
        parts = []
        for name in ("qemu.log", "console", "output"):
            text = (self.directory / name).read_bytes().decode(errors="replace").replace("\r", "")
            parts += [f"--- {name}", *text.splitlines()[-lines:]]
        return "\n".join(parts)

    def end(self, seconds: float = END_LIMIT) -> None:
        """Let it end by itself for so long, then end it; remove what it left."""
        try:
            self.process.wait(seconds or 0.01)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def close(self) -> None:
        """End it, and remove what it left. Where tests were left out, at once."""
        self.end(END_LIMIT if self._finished.issuperset(self._tests) else 0)
        if keep := os.environ.get("QAT_KEEP_GUEST"):
            shutil.copytree(self.directory, Path(keep) / self.directory.name)
        self._shared.cleanup()
