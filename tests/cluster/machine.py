"""A guest that stays up and does what the host's tests ask of it: a node with systemd, containerd and the kubelet.

    with Machine(disk()) as guest:                 # QEMU starts; the guest boots meanwhile
        guest.run("systemctl start kubelet")       # a shell's script: what it prints; CommandError when it fails
        guest.until("healthy", "busybox wget -qO- http://127.0.0.1:10255/healthz")   # again and again until it succeeds
        guest.share / "kubelet.log"                # what the guest sees as /run/host: read and written from both sides
        guest.reboot()                             # the disk, and so all that was written, stays; memory does not

The guest's root is this machine's own (read-only, so the project and its .venv are where they are here), with a layer
above it on the disk. PID 1 is systemd with nothing of this machine's services (guest/start). Containerd is Debian's
unit, `containerd`; `kubelet` is guest/units/kubelet.service. Neither is started by the boot unless it was enabled. Each
command is a process of its own, so several can be under way; what one starts with setsid or by systemd-run lives on. A
disk is never changed: what guests write is in a copy that ends with them.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

from kernel import machine
from kernel.machine import GuestError, qemu
from kernel.machine import why_not as why_no_guest

BOOT_LIMIT: Final = 600.0
LIMIT: Final = 300.0
"""Seconds: software emulation is slow, its speed changes, and machines are shared."""
_LOOK: Final = 0.05
_HERE: Final = Path(__file__).parent
_TAIL: Final = 40

_T = TypeVar("_T")


class CommandError(Exception):
    """A command has failed in the guest, or what was waited for did not come."""

    def __init__(self, command: str, status: int | None, output: str) -> None:
        super().__init__(f"{'no end' if status is None else f'status {status}'} of: {command}\n{output}")
        self.status = status
        self.output = output


def why_not() -> str:
    """Why there can be no such guest here, "" if there can."""
    if reason := why_no_guest():
        return reason
    if not (machine.BUILD / "initramfs").exists():
        return "tests/kernel/prepare has not been run"
    return "" if Path("/lib/systemd/systemd").exists() else "needs systemd: the guest is booted by it"


class Machine:
    """A guest with a copy of `disk`. `memory` in MiB; `words` are for the kernel's command line."""

    def __init__(self, disk: Path, memory: int = 4096, words: Sequence[str] = ()) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="qat-node-")
        self.share = Path(self._directory.name)
        (self.share / "commands").mkdir()
        self._boots = 1
        self._number = 0
        self._log = (self.share / "qemu.log").open("wb")
        drive = f"file={disk},format=raw,if=none,id=disk,snapshot=on,cache=unsafe"
        own = ("qat.disk=/dev/vda", f"qat.run={_HERE / 'guest/start'}", "systemd.show_status=no", "systemd.gpt_auto=no")
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            [
                *qemu(self.share, memory=memory, words=(*own, *words)),
                *("-drive", drive, "-device", "virtio-blk-pci,drive=disk"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "TMPDIR": self._directory.name},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def booted(self) -> float:
        """Wait until it takes commands: seconds since QEMU's start, or since `reboot`."""
        self._wait("it takes commands", lambda: len(self._booted()) >= self._boots, BOOT_LIMIT)
        return time.monotonic() - self._began

    def run(self, script: str, check: bool = True, seconds: float = LIMIT) -> str:
        """Run a script with bash as root: what it prints, to both outputs. Raises CommandError when it does not end in
        time, or, unless `check` is false, with another status than 0."""
        self._number += 1
        path = self.share / "commands" / str(self._number)
        path.with_name(f"{path.name}.new").write_text(script + "\n")
        path.with_name(f"{path.name}.new").rename(path)
        status = path.with_name(f"{path.name}.status")

        def output() -> str:
            with contextlib.suppress(FileNotFoundError):
                return path.with_name(f"{path.name}.out").read_text(errors="replace")
            return ""

        try:
            self._wait(f"`{script}` ends", status.exists, seconds if self._booted() else seconds + BOOT_LIMIT)
        except TimeoutError:
            raise CommandError(script, None, f"{output()}\n{self.tail()}") from None
        if check and (ended := int(status.read_text())) != 0:
            raise CommandError(script, ended, output())
        return output()

    def until(self, what: str, script: str, seconds: float = LIMIT) -> str:
        """Run a script again and again, in the guest, until it succeeds: what it printed then."""
        again = (
            f"until last=$({{ {script}\n}} 2>&1); do\n"
            f'[[ $SECONDS -lt {seconds:.0f} ]] || {{ echo "$last"; exit 1; }}; sleep 0.3\ndone\n'
        )
        try:
            return self.run(f'{again}echo "$last"', seconds=seconds + LIMIT)
        except CommandError as error:
            raise CommandError(f"waiting until {what}: {script}", error.status, error.output) from None

    def wait(self, what: str, condition: Callable[[], _T], seconds: float = LIMIT) -> _T:
        """Wait until a condition, which asks the guest, returns something true: that. Raises CommandError."""
        try:
            return self._wait(what, condition, seconds)
        except TimeoutError:
            raise CommandError(f"waiting until {what}", None, self.tail()) from None

    def reboot(self, command: str = "systemctl reboot") -> float:
        """Restart the machine with its disk, by this command in the guest: seconds until it takes commands again."""
        self._boots += 1
        self._began = time.monotonic()
        self._number += 1
        (self.share / "commands" / str(self._number)).write_text(f"{command}\n")
        return self.booted()

    def tail(self, lines: int = _TAIL) -> str:
        """The ends of what QEMU, the guest's console and the kubelet have printed."""
        parts = []
        for name in ("qemu.log", "console", "kubelet.log"):
            if (path := self.share / name).exists():
                text = path.read_bytes().decode(errors="replace").replace("\r", "")
                parts += [f"--- {name}", *text.splitlines()[-lines:]]
        return "\n".join(parts)

    def close(self) -> None:
        """End it, and remove what it left; QAT_KEEP_GUEST=DIRECTORY keeps that."""
        self.process.kill()
        self.process.wait()
        self._log.close()
        if keep := os.environ.get("QAT_KEEP_GUEST"):
            shutil.copytree(self.share, Path(keep) / self.share.name)
        self._directory.cleanup()

    def _booted(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.share / "boots").read_text().splitlines()
        return []

    def _wait(self, what: str, condition: Callable[[], _T], seconds: float) -> _T:
        deadline = time.monotonic() + seconds
        while True:
            if found := condition():
                return found
            if self.process.poll() is not None:
                raise GuestError(f"the guest ended before {what}\n{self.tail()}")
            if len(self._booted()) > self._boots:
                raise GuestError(f"the guest has started anew before {what}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(what)
            time.sleep(_LOOK)
