"""A pod's containers run by runc as the manifest describes them, as far as one node without a kubelet can.

From the rendered manifest, with nothing rewritten: arguments, environment, user, group, capabilities, no_new_privs,
read-only root, seccomp, mounts, limits. From the image: entry point, environment. One network namespace for the pod,
one PID and mount namespace for each container. What a kubelet and its runtime would add is in `configuration`.
"""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from deployments.images import Image
from deployments.rendered import ROOT

Spec = dict[str, Any]

_DEFAULT_SECCOMP: Final = Path("/usr/share/containers/seccomp.json")
_PERIOD: Final = 100_000  # microseconds, of the CPU quota
_UNITS: Final = {"Ki": 1024, "Mi": 1024**2, "Gi": 1024**3}
_ARCHITECTURES: Final = {"x86_64": ("SCMP_ARCH_X86_64", "amd64"), "aarch64": ("SCMP_ARCH_AARCH64", "arm64")}


@functools.cache
def why_not() -> str:
    """Why containers cannot be run here, "" if they can."""
    if os.geteuid() != 0:
        return "needs root: containers are made with the users that the manifests name"
    for tool in ("runc", "nsenter", "unshare"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    if not _DEFAULT_SECCOMP.exists():
        return f"needs {_DEFAULT_SECCOMP} (golang-github-containers-common), which stands for RuntimeDefault"
    return ""


class Sandbox:
    """What the containers of a pod share: network, IPC and host name. Made by `sandbox`."""

    def __init__(self, holder: "subprocess.Popen[bytes]") -> None:
        self.holder = holder

    def namespace(self, kind: str) -> str:
        return f"/proc/{self.holder.pid}/ns/{kind}"

    def get(self, port: int, path: str) -> tuple[int, bytes]:
        """GET from the pod's own address space: status and body. Raises OSError when nothing listens."""
        command = ["nsenter", f"--net={self.namespace('net')}", "python3", "-I", "-c", _GET, str(port), path]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode != 0:
            raise ConnectionRefusedError(done.stderr.decode().strip().splitlines()[-1:])
        status, _, body = done.stdout.partition(b"\n")
        return int(status), body


_GET: Final = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
connection.request("GET", sys.argv[2])
response = connection.getresponse()
sys.stdout.buffer.write(b"%d\\n" % response.status + response.read())
"""


@contextmanager
def sandbox() -> Iterator[Sandbox]:
    """The pod's namespaces, with a loopback device that is up, until the end of the block."""
    # ip is not everywhere; the loopback device is brought up by an ioctl of its flags (netdevice(7)).
    up = (
        "import fcntl, signal, socket, struct; s = socket.socket();"
        "fcntl.ioctl(s, 0x8914, struct.pack('16sh22x', b'lo', 0x41)); print('up', flush=True); signal.pause()"
    )
    command = ["unshare", "--net", "--ipc", "--uts", "python3", "-I", "-c", up]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"up\n"
            yield Sandbox(holder)
        finally:
            holder.kill()


class Container:
    """One container of a pod, made in `directory`. `command` runs it in the foreground; the rest is for meanwhile.

    `volumes`: by a volume's name, the directory (or file) of this machine that stands for it. `extra_mounts` and
    `extra_environment` are beyond the manifest, and only what a simulated node cannot do without.
    """

    def __init__(
        self,
        directory: Path,
        image: Image,
        pod: Spec,
        spec: Spec,
        shared: Sandbox,
        volumes: Mapping[str, Path],
        sysfs: Path,
        extra_mounts: Sequence[tuple[Path, str]] = (),
        extra_environment: Sequence[str] = (),
    ) -> None:
        bundle = Path(tempfile.mkdtemp(prefix=f"{spec['name']}-", dir=directory))
        self.name = f"{directory.name}-{bundle.name}"
        self._state = directory / "runc"
        self._bundle = bundle
        self._pod, self._spec, self._image, self._sandbox = pod, spec, image, shared
        self._volumes, self._sysfs = volumes, sysfs
        self._extra_mounts, self._extra_environment = extra_mounts, extra_environment
        # Directories of its own, since the runtime makes mount points in them; the files are the image's.
        subprocess.run(["cp", "--archive", "--link", image.root, bundle / "rootfs"], check=True)
        (bundle / "config.json").write_text(json.dumps(self.configuration(), indent=1))

    @property
    def command(self) -> list[str]:
        return ["runc", "--root", os.fspath(self._state), "run", "--bundle", os.fspath(self._bundle), self.name]

    @property
    def pid(self) -> int:
        """Of its first process, as this machine sees it."""
        state = subprocess.run(
            ["runc", "--root", self._state, "state", self.name], capture_output=True, check=True
        ).stdout
        return int(json.loads(state)["pid"])

    def run_inside(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """As kubectl exec."""
        inside = ["runc", "--root", os.fspath(self._state), "exec", self.name, *command]
        return subprocess.run(inside, capture_output=True, text=True, check=False)

    def run_to_its_end(self) -> "subprocess.CompletedProcess[str]":
        """Run it until it has ended, in five minutes at most, and forget it: its status and outputs."""
        try:
            return subprocess.run(self.command, capture_output=True, text=True, check=False, timeout=300)
        finally:
            self.remove()

    def remove(self) -> None:
        """End it, if it still runs, and forget it."""
        subprocess.run(
            ["runc", "--root", self._state, "delete", "--force", self.name], capture_output=True, check=False
        )

    def peak_memory(self) -> int | None:
        """Bytes, the most that its cgroup has had; None where that cannot be known."""
        group = f"qat-test/{self.name}"
        for path in (f"memory/{group}/memory.max_usage_in_bytes", f"{group}/memory.peak"):
            with contextlib.suppress(OSError):
                return int(Path("/sys/fs/cgroup", path).read_text())
        return None

    def configuration(self) -> Spec:
        """The OCI runtime specification of it."""
        context = {**self._pod.get("securityContext", {}), **self._spec.get("securityContext", {})}
        capabilities = [f"CAP_{name}" for name in context.get("capabilities", {}).get("add", ())]
        assert context["capabilities"]["drop"] == ["ALL"]
        uid, gid = context.get("runAsUser", self._image.uid), context.get("runAsGroup", self._image.gid)
        return {
            "ociVersion": "1.0.2",
            "hostname": "node",
            "process": {
                "user": {"uid": uid, "gid": gid},
                "args": self._command(),
                "env": [*self._image.environment, *self._environment(), *self._extra_environment],
                "cwd": "/",
                "noNewPrivileges": not context["allowPrivilegeEscalation"],
                # Of another uid than 0, capabilities are only in the bounding set, as of a container runtime.
                "capabilities": {
                    kind: capabilities if uid == 0 or kind == "bounding" else []
                    for kind in ("bounding", "effective", "permitted")
                },
            },
            "root": {"path": "rootfs", "readonly": context["readOnlyRootFilesystem"]},
            "mounts": [*_standard_mounts(self._sysfs), *self._mounts()],
            "linux": {
                "namespaces": [
                    {"type": "pid"},
                    {"type": "mount"},
                    {"type": "network", "path": self._sandbox.namespace("net")},
                    {"type": "ipc", "path": self._sandbox.namespace("ipc")},
                    {"type": "uts", "path": self._sandbox.namespace("uts")},
                ],
                "cgroupsPath": f"/qat-test/{self.name}",
                "resources": self._resources(),
                "seccomp": _seccomp(context["seccompProfile"], capabilities),
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }

    def _command(self) -> list[str]:
        if "command" in self._spec:
            return [*self._spec["command"], *self._spec.get("args", ())]
        return [*self._image.entrypoint, *self._spec.get("args", ())]

    def _environment(self) -> Iterator[str]:
        for each in self._spec.get("env", ()):
            value = each.get("value")
            if value is None:
                assert each["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"
                value = "node"
            yield f"{each['name']}={value}"

    def _mounts(self) -> Iterator[Spec]:
        # Outer ones first, as runtimes sort them.
        for mount in sorted(self._spec.get("volumeMounts", ()), key=lambda each: str(each["mountPath"])):
            options = ["rbind", "rprivate", "ro" if mount.get("readOnly") else "rw"]
            source = os.fspath(self._volumes[mount["name"]])
            yield {"destination": mount["mountPath"], "type": "bind", "source": source, "options": options}
        for path, destination in self._extra_mounts:
            yield {"destination": destination, "type": "bind", "source": os.fspath(path), "options": ["bind", "rw"]}

    def _resources(self) -> Spec:
        limits = self._spec["resources"]["limits"]
        number, unit = limits["memory"][:-2], limits["memory"][-2:]
        return {
            "devices": [{"allow": False, "access": "rwm"}],
            "memory": {"limit": int(number) * _UNITS[unit]},
            "cpu": {"quota": int(float(limits["cpu"]) * _PERIOD), "period": _PERIOD},
        }


def _standard_mounts(sysfs: Path) -> list[Spec]:
    """Those of every container; /sys is the simulated node's, read-only as a container's is."""
    plain = ["nosuid", "noexec", "nodev"]
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": plain},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*plain, "mode=1777", "size=65536k"]},
        {"destination": "/sys", "type": "bind", "source": os.fspath(sysfs), "options": [*plain, "rbind", "ro"]},
    ]


def _seccomp(profile: Spec, capabilities: Sequence[str]) -> Spec:
    """A profile as the manifest names it (a Localhost one is the project's own file of that name), or one given."""
    if profile["type"] == "Given":
        given: Spec = profile["profile"]
        return given
    if profile["type"] == "Localhost":
        name = Path(profile["localhostProfile"])
        assert name.parent == Path("qat-plugin")
        made: Spec = json.loads((ROOT / "seccomp" / name.name).read_text())
        return made
    assert profile["type"] == "RuntimeDefault"
    file = json.loads(_DEFAULT_SECCOMP.read_text())
    seccomp_name, name_of_machine = _ARCHITECTURES[os.uname().machine]
    rules = []
    for rule in file["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if not set(includes.get("caps", ())) <= set(capabilities) or set(excludes.get("caps", ())) & set(capabilities):
            continue
        if name_of_machine not in includes.get("arches", [name_of_machine]) or name_of_machine in excludes.get(
            "arches", ()
        ):
            continue
        kept = ("names", "action", "args", "errnoRet")
        rules.append({key: rule[key] for key in kept if rule.get(key) is not None})
    default = {"defaultAction": file["defaultAction"], "defaultErrnoRet": file["defaultErrnoRet"]}
    return {**default, "architectures": [seccomp_name], "syscalls": rules}


@contextmanager
def pod_directory(parent: str) -> Iterator[Path]:
    """A directory with a short name that everybody may pass through."""
    with tempfile.TemporaryDirectory(prefix="qat-", dir=parent) as made:
        Path(made).chmod(0o755)
        yield Path(made)
