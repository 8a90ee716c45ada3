"""The plugin's pod on a simulated node, as the demo's, but both processes are the images' own, run as manifests say.

Beyond the manifest are only two things: the server is told of the simulated node's uevents and given their socket
(a simulated kernel has no netlink), and the simulated tree stands where /sys would be.
"""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from deployments import containers, rendered
from deployments.containers import Container, Sandbox
from deployments.images import image
from deployments.rendered import BUILT, Manifest
from qat_server.command_line.status import client
from qat_server.kubelet.registration.directories import Registration, socket_directory
from qat_server.observability.status_format import STATUS_SOCKET, Status
from qat_simulation.interception import supervisor as interception
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.kubelet.kubelet import Kubelet
from qat_simulation.node.description import Node
from qat_simulation.running_node import RunningNode, short_tmp

_UEVENTS: Final = "/run/uevents.sock"
_WRITTEN: Final = ("/sys/bus/pci", "/sys/devices")
"""What the helper's container has of /sys to write. The supervisor sees paths as the container does, and the runtime
itself writes to the real /sys/fs/cgroup, so only these are looked at."""


class PodNode(RunningNode):
    """Made by `pod_node`. `made` has the containers that run, by name."""

    def __init__(
        self,
        directory: Path,
        kernel: Kernel,
        kubelet: Kubelet,
        manifests: list[Manifest],
        shared: Sandbox,
        bundles: Path,
    ) -> None:
        super().__init__(directory, kernel, kubelet, ())
        self.made: dict[str, Container] = {}
        self._supervisors: list[interception.Supervisor] = []
        self.pod = rendered.pod_spec(manifests)
        self._shared = shared
        self._bundles = bundles
        self._configs = {each["metadata"]["name"]: each["data"] for each in manifests if each["kind"] == "ConfigMap"}
        self._volumes = dict(self._made_volumes())

    @property
    def metrics_port(self) -> int:
        """In the pod's network."""
        return int(rendered.container(self.pod, "server")["ports"][0]["containerPort"])

    @property
    def audit_log(self) -> Path:
        return self._volumes["audit-log"] / "audit.jsonl"

    def start_helper(self) -> None:
        """Start the helper's container, its writes answered by the emulated kernel."""
        container = self._container("helper")
        with self._open_log("helper") as log:
            self.helper, supervisor = interception.spawn(
                container.command,
                [Path(path) for path in _WRITTEN],
                lambda path, data: self.kernel.intercepted(self._as_ours(path), data),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self._supervisors.append(supervisor)

    def _as_ours(self, path: str) -> str:
        """The path in the simulated tree of a file that a container sees beneath /sys."""
        return os.fspath(self.kernel.sysfs_root / path.removeprefix("/sys/"))

    def start_server(self) -> None:
        """Start the server's container."""
        container = self._container("server")
        with self._open_log("server") as log:
            self.server = subprocess.Popen(
                container.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
            )

    async def get(self, path: str) -> tuple[int, bytes]:
        """From within the pod's network."""
        return self._shared.get(self.metrics_port, path)

    async def status(self) -> Status:
        """By the local socket, as `qat-plugin status` in the server's container: the network does not have it."""
        sockets = [socket_directory(self.kubelet_directory, way) / STATUS_SOCKET for way in Registration]
        try:
            return client.decoded(await asyncio.to_thread(client.fetch_local, sockets))
        except client.StatusError as error:
            raise ConnectionRefusedError(str(error)) from error

    async def end(self) -> None:
        await super().end()
        for container in self.made.values():
            container.remove()
        for supervisor in self._supervisors:
            supervisor.stop()

    def _container(self, name: str) -> Container:
        if (old := self.made.pop(name, None)) is not None:
            old.remove()
        server = name == "server"
        self.made[name] = Container(
            self._bundles,
            image(name),
            self.pod,
            rendered.container(self.pod, name),
            self._shared,
            self._volumes,
            self.kernel.sysfs_root,
            extra_mounts=[(self.kernel.uevents_path, _UEVENTS)] if server else [],
            extra_environment=[f"QAT_PLUGIN_UEVENTS=unix:{_UEVENTS}"] if server else [],
        )
        return self.made[name]

    def _made_volumes(self) -> Iterator[tuple[str, Path]]:
        """What a kubelet would make of the pod's volumes, on this node."""
        for volume in self.pod["volumes"]:
            name, path = volume["name"], self.directory / "volumes" / volume["name"]
            if "hostPath" in volume:
                path = self._on_this_node(volume["hostPath"]["path"])
                if volume["hostPath"]["type"] == "DirectoryOrCreate":
                    path.mkdir(mode=0o755, parents=True, exist_ok=True)
                assert path.is_dir(), path
            elif "emptyDir" in volume:
                path.mkdir(parents=True)
                path.chmod(0o777)
            else:
                source = volume["configMap"]
                path.parent.mkdir(parents=True, exist_ok=True)
                ConfigMap(path, source.get("defaultMode", 0o644)).write(self._configs[source["name"]])
            yield name, path

    def _on_this_node(self, path: str) -> Path:
        """Where a path of the host is on the simulated node."""
        for theirs, ours in (("/sys", self.kernel.sysfs_root), ("/var/lib/kubelet", self.kubelet_directory)):
            if path.startswith(f"{theirs}/"):
                return ours / path.removeprefix(f"{theirs}/")
        return self.directory / "host" / path.removeprefix("/")


@asynccontextmanager
async def pod_node(node: Node, manifests: list[Manifest]) -> AsyncIterator[PodNode]:
    """A node with the emulated kernel and kubelet, and the plugin's pod, whose containers the caller starts."""
    with (
        containers.pod_directory(short_tmp()) as directory,
        containers.pod_directory(os.fspath(BUILT)) as bundles,
        containers.sandbox() as shared,
        contextlib.closing(Kernel(directory, node)) as kernel,
    ):
        (directory / "run").mkdir()
        kubelet = Kubelet(directory / "kubelet")
        await kubelet.start()
        for name in ("", "device-plugins", "plugins_registry", "pod-resources"):
            (directory / "kubelet" / name).chmod(0o750)
        running = PodNode(directory, kernel, kubelet, manifests, shared, bundles)
        try:
            yield running
            assert kernel.defects == []
        finally:
            await running.end()
            await kubelet.stop()
