"""The process of the compiled kubelet (harness/, built by ./build): its start, its commands, its end and its log.

Each command has its own connection, so that commands can be under way at the same time. The kubelet's log, and the
trace of its crash, is `log`, beside the kubelet's directory.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from kubelet.answers import KubeletDiedError, KubeletError, KubeletPanicError

HARNESS: Final = Path(__file__).parent / "harness" / "bin" / "kubelet-harness"
_T = TypeVar("_T")
_ANSWER_LIMIT: Final = 64 << 20  # bytes of one answer: thousands of devices fit


class _Error(msgspec.Struct):
    kind: str
    reason: str
    message: str


class _Answer(msgspec.Struct):
    ok: bool
    ms: float
    result: msgspec.Raw = msgspec.Raw(b"{}")
    error: _Error | None = None


def why_not() -> str:
    """Why there can be no harness here, "" if there can."""
    return "" if shutil.which("go") or HARNESS.exists() else "Go is needed to compile the kubelet"


def build(output: Path = HARNESS) -> str:
    """Build the harness unless it is up to date (minutes with empty caches): the script's line. Raises KubeletError."""
    script = Path(__file__).parent / "build"
    done = subprocess.run([script, output], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KubeletError("build", f"{script} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


class Harness:
    """One at a time for the kubelet on `directory`: it can be launched again after its end."""

    def __init__(self, directory: Path, program: Path, options: Sequence[str]) -> None:
        self.control = directory.with_name(directory.name + ".control")
        self.log = directory.with_name(directory.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None
        self._command = [
            str(program),
            f"--kubelet-dir={directory}",
            f"--control={self.control}",
            f"--log={self.log}",
            *options,
        ]

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    async def kill(self) -> None:
        """End it by a SIGKILL."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            await _reap(process)

    async def close(self) -> None:
        """End it, in order if it lets itself be ended. Raises nothing: a test has said what it had to say."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 5)
        except subprocess.TimeoutExpired:
            process.kill()
        await _reap(process)

    def log_tail(self, lines: int = 60) -> str:
        """The last lines of the kubelet's log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return "(no log)"

    async def launch(self) -> None:
        """Return when it takes commands. Raises KubeletError, KubeletDiedError."""
        if self.alive:
            return
        if self.process is not None:  # crashed
            await _reap(self.process)
        if not os.access(self._command[0], os.X_OK):
            raise KubeletError("build", f"{self._command[0]} is not there: run tests/kubelet/build")
        self.control.unlink(missing_ok=True)
        # The harness ends when its standard input does: when this process ends, however it ends.
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        async with asyncio.timeout(60):
            while not await self._accepts():
                if self.process.poll() is not None:
                    raise KubeletDiedError(self.process.returncode, self.log_tail())
                await asyncio.sleep(0.002)

    async def _accepts(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(self.control)
        except (FileNotFoundError, ConnectionRefusedError):  # refused: bound, and not yet listening
            return False
        writer.close()
        await writer.wait_closed()
        return True

    async def ask(self, command: str, result: type[_T], **arguments: Any) -> _T:
        """Carry out one command. Raises KubeletError, or KubeletDiedError when there is no answer to come."""
        line = b""
        # A kubelet that dies answers nothing, in one of several ways.
        with contextlib.suppress(ConnectionError, FileNotFoundError):
            reader, writer = await asyncio.open_unix_connection(self.control, limit=_ANSWER_LIMIT)
            try:
                writer.write(msgspec.json.encode({"command": command, "arguments": arguments}) + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
        if not line:
            raise await self._death()
        answer = msgspec.json.decode(line, type=_Answer)
        if answer.error is None:
            return msgspec.json.decode(answer.result, type=result)
        raise KubeletError(answer.error.kind, answer.error.message, answer.error.reason)

    async def _death(self) -> KubeletDiedError:
        process = self.process
        if process is None:  # killed, closed or never started
            return KubeletDiedError(None, self.log_tail())
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, 5)
        crashed = process.returncode == 2  # the Go runtime's status after a panic
        return (KubeletPanicError if crashed else KubeletDiedError)(process.returncode, self.log_tail())


async def _reap(process: "subprocess.Popen[bytes]") -> None:
    await asyncio.to_thread(process.wait)
    if process.stdin is not None:
        process.stdin.close()
