"""The real kubelet's device manager, for tests: starts the harness (harness/, built by ./build), speaks its commands.

    from kubelet.real_kubelet import RealKubelet       # tests/ is on pytest's path

    async with RealKubelet(Path("/tmp/qat-x/kubelet")) as kubelet:
        await kubelet.wait_for(allocatable={"qat.intel.com/cy": 4})
        allocation = await kubelet.allocate("pod-a", [("main", "qat.intel.com/cy", 2)])

Each command has its own connection, so that commands can be under way at the same time. The kubelet's log, and the
trace of its crash, is `log`, beside the kubelet's directory.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

import msgspec

from kubelet.answers import (
    AdmissionError,
    Allocation,
    Check,
    ContainerAllocation,
    Device,
    KubeletDiedError,
    KubeletError,
    KubeletPanicError,
    PodDevices,
    Quantities,
    RefusedPod,
    TopologyAffinityError,
    Waited,
)
from qat_server.simulation.topology import TopologyPolicy

HARNESS: Final = Path(__file__).parent / "harness" / "bin" / "kubelet-harness"
CHECKPOINT: Final = "kubelet_internal_checkpoint"

Damage = Literal["garbage", "checksum", "empty", "removed"]
_T = TypeVar("_T")

_ANSWER_LIMIT: Final = 64 << 20  # bytes of one answer: thousands of devices fit


class _Devices(msgspec.Struct):
    devices: dict[str, tuple[Device, ...]]


class _Allocated(msgspec.Struct):
    pod: str
    containers: tuple[ContainerAllocation, ...]


class _Pods(msgspec.Struct):
    pods: tuple[PodDevices, ...]


class _Status(msgspec.Struct):
    containers: dict[str, dict[str, dict[str, str]]]


class _Watcher(msgspec.Struct):
    settled: bool


class _Started(msgspec.Struct):
    refused: tuple[RefusedPod, ...]


class _Nothing(msgspec.Struct):
    pass


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


class RealKubelet:
    """One kubelet on `directory` (its --kubelet-dir), with `numa` NUMA nodes. Pods outlive its restarts and crashes."""

    def __init__(
        self,
        directory: Path,
        policy: TopologyPolicy = TopologyPolicy.BEST_EFFORT,
        numa: int = 2,
        harness: Path = HARNESS,
        verbosity: int = 4,
    ) -> None:
        self.directory = directory
        self.control = directory.with_name(directory.name + ".control")
        self.log = directory.with_name(directory.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None
        self._command = [
            str(harness),
            f"--kubelet-dir={directory}",
            f"--control={self.control}",
            f"--log={self.log}",
            f"--policy={policy}",
            f"--numa={numa}",
            f"-v={verbosity}",
        ]

    @property
    def plugin_directory(self) -> Path:
        return self.directory / "device-plugins"

    @property
    def registry_directory(self) -> Path:
        return self.directory / "plugins_registry"

    @property
    def registration_socket(self) -> Path:
        return self.plugin_directory / "kubelet.sock"

    @property
    def pod_resources_socket(self) -> Path:
        return self.directory / "pod-resources" / "kubelet.sock"

    @property
    def alive(self) -> bool:
        """Whether the process runs: a kubelet that crashed is not alive, one that was stopped is."""
        return self.process is not None and self.process.poll() is None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        await self.close()

    async def start(self, *, reboot: bool = False) -> tuple[RefusedPod, ...]:
        """Start the stopped, killed or never started kubelet. Pods from before are admitted again: those refused are
        returned, and gone. With `reboot` their containers do not run, as after a reboot of the node."""
        await self._launch()
        return (await self._ask("start", _Started, reboot=reboot)).refused

    async def stop(self, kill: bool = False) -> None:
        """Stop the kubelet in order: streams end, its sockets are removed. With `kill` its process gets a SIGKILL and
        the sockets stay behind (as always in production: the kubelet just exits). `start` starts it again."""
        if not kill:
            await self._ask("stop", _Nothing)
            return
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            await _reap(process)

    async def restart(self, kill: bool = False, *, reboot: bool = False) -> tuple[RefusedPod, ...]:
        """`stop` and `start`: milliseconds."""
        await self.stop(kill)
        return await self.start(reboot=reboot)

    async def close(self) -> None:
        """End the process, in order if it lets itself be ended. Raises nothing: a test has said what it had to say."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 5)
        except subprocess.TimeoutExpired:
            process.kill()
        await _reap(process)

    def damage_checkpoint(self, damage: Damage = "garbage") -> None:
        """Damage the file in which the kubelet keeps who has which device. The kubelet must be stopped or killed."""
        damage_checkpoint(self.plugin_directory, damage)

    async def capacity(self) -> dict[str, int]:
        """The node's capacity: healthy and unhealthy devices of each resource."""
        return (await self.quantities()).capacity

    async def allocatable(self) -> dict[str, int]:
        """The node's allocatable: healthy devices of each resource, allocated or not."""
        return (await self.quantities()).allocatable

    async def allocatable_free(self) -> dict[str, int]:
        """Of each resource, the healthy devices that no pod has."""
        return {
            name: sum(device.allocatable and device.holder is None for device in devices)
            for name, devices in (await self.devices()).items()
        }

    async def quantities(self) -> Quantities:
        """Capacity and allocatable at one moment."""
        return await self._ask("capacity", Quantities)

    async def wait_for(
        self,
        *,
        capacity: Mapping[str, int | None] | None = None,
        allocatable: Mapping[str, int | None] | None = None,
        seconds: float = 20,
    ) -> Waited:
        """Wait until these resources are so (None: unknown), whatever others are. Raises TimeoutError."""
        try:
            return await self._ask(
                "wait",
                Waited,
                capacity=dict(capacity or {}),
                allocatable=dict(allocatable or {}),
                timeout_ms=round(seconds * 1000),
            )
        except KubeletError as error:
            if error.kind != "timeout":
                raise
            raise TimeoutError(
                f"wanted capacity {dict(capacity or {})} and allocatable {dict(allocatable or {})}; {error}"
            ) from None

    async def devices(self) -> dict[str, tuple[Device, ...]]:
        """Every device that plugins have listed, by resource."""
        return (await self._ask("devices", _Devices)).devices

    async def check(self) -> Check:
        """Compare the kubelet's books with each other; see `Check`. Waits for an admission under way."""
        return await self._ask("check", Check)

    async def settled(self) -> bool:
        """Whether the plugin watcher has registered all that it has found, and will change nothing by itself."""
        return (await self._ask("watcher", _Watcher)).settled

    async def healthy(self) -> bool:
        """The device manager's part of /healthz."""
        try:
            await self._ask("health", _Nothing)
        except KubeletError as error:
            if error.kind != "unhealthy":
                raise
            return False
        return True

    async def allocate(self, pod: str, requests: Sequence[tuple[str, str, int]]) -> Allocation:
        """Create a pod that asks for `requests` (container, resource, number), admit it and start its containers.

        A pod that is there already, and asked for the same, is admitted anew and keeps its devices.
        Raises AdmissionError when the kubelet refuses it: the pod is then gone. KubeletError of kind "container" when a
        container of the admitted pod cannot be started: the pod then stays.
        """
        containers: dict[str, dict[str, int]] = {}
        for container, resource, number in requests:
            containers.setdefault(container, {})[resource] = number
        try:
            allocated = await self._ask(
                "allocate",
                _Allocated,
                pod=pod,
                containers=[{"name": name, "resources": resources} for name, resources in containers.items()],
            )
        except KubeletError as error:
            if error.kind != "admission":
                raise
            kind = TopologyAffinityError if error.reason == "TopologyAffinityError" else AdmissionError
            raise kind(pod, error.reason, error.message) from None
        return Allocation({container.name: container for container in allocated.containers}, pod)

    async def restart_container(self, pod: str, container: str) -> ContainerAllocation:
        """Start a container of an admitted pod again, as after its crash: no admission, and no other devices."""
        return await self._ask("prestart", ContainerAllocation, pod=pod, container=container)

    async def free(self, pod: str) -> None:
        """Delete a pod. Raises KubeletError of kind "not-found"."""
        await self._ask("free", _Nothing, pod=pod)

    async def pods(self) -> tuple[PodDevices, ...]:
        """The pods that there are, in the order of their creation."""
        return (await self._ask("pods", _Pods)).pods

    async def devices_of(self, pod: str) -> set[str]:
        """The ids of a pod's devices; empty when there is no such pod."""
        return next((entry.devices for entry in await self.pods() if entry.pod == pod), set())

    async def status(self, pod: str) -> dict[str, dict[str, dict[str, str]]]:
        """A pod's allocatedResourcesStatus: "Healthy" or "Unhealthy" by container, resource and device id."""
        return (await self._ask("status", _Status, pod=pod)).containers

    async def age(self, resource: str, seconds: int = 301) -> None:
        """Let time pass for a resource whose endpoint has stopped: it is forgotten after 300 s."""
        await self._ask("age", _Nothing, resource=resource, seconds=seconds)

    def log_tail(self, lines: int = 60) -> str:
        """The last lines of the kubelet's log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return "(no log)"

    async def _launch(self) -> None:
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

    async def _ask(self, command: str, result: type[_T], **arguments: Any) -> _T:
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


def damage_checkpoint(plugin_directory: Path, damage: Damage) -> None:
    """Damage the checkpoint of a kubelet that does not run."""
    path = plugin_directory / CHECKPOINT
    match damage:
        case "garbage":
            path.write_bytes(b"\x00garbage{")
        case "checksum":
            content = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
            path.write_bytes(msgspec.json.encode({**content, "Checksum": 1}))
        case "empty":
            path.write_bytes(b"")
        case "removed":
            path.unlink()


async def _reap(process: "subprocess.Popen[bytes]") -> None:
    await asyncio.to_thread(process.wait)
    if process.stdin is not None:
        process.stdin.close()
