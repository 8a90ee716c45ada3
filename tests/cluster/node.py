"""A node in the guest, as tests ask it: its standalone kubelet, pods from files, their containers and processes."""

import json
import shlex
import sys
from collections.abc import Callable
from typing import Any, Final

import msgspec

from cluster.machine import Machine
from cluster.static_pod import File, static_pod
from deployments.rendered import Manifest
from kernel.machine import PROJECT
from qat_simulation.node.description import Node

_MANIFESTS: Final = "/etc/kubernetes/manifests"
_KUBELET: Final = "http://127.0.0.1:10255"
HOST_NAME: Final = "node"
LABEL: Final = "intel.feature.node.kubernetes.io/qat=true"
PYTHON: Final = f"env PYTHONPATH={PROJECT}/tests {sys.executable}"
"""A Python with the project in it, for scripts in the guest."""


class KubeletNode:
    """What is on a guest. A pod's name here is that of its manifest; the kubelet adds the node's."""

    def __init__(self, guest: Machine) -> None:
        self.guest = guest

    def start(self) -> None:
        """Containerd, the kubelet: until the kubelet says that it is well."""
        # What a person does with kubectl label: without an API server, the kubelet labels its node itself.
        options = f'[Service]\nEnvironment="KUBELET_OPTIONS=--node-labels={LABEL}"'
        drop_in = "/etc/systemd/system/kubelet.service.d"
        self.guest.run(f"mkdir -p {drop_in}; echo '{options}' >{drop_in}/labels.conf; systemctl daemon-reload")
        self.guest.run("systemctl enable --now containerd kubelet 2>&1")
        self.until_healthy()

    def until_healthy(self) -> None:
        self.guest.until("the kubelet is well", f"busybox wget -qO- {_KUBELET}/healthz")

    def devices(self, node: Node) -> None:
        """Put in the fake devices of a description, in place of those before."""
        (self.guest.share / "node.json").write_bytes(msgspec.json.encode(node))
        self.guest.run(f"modprobe vfio-pci && {PYTHON} {PROJECT}/tests/cluster/guest/devices.py /run/host/node.json")

    def apply(self, manifest: Manifest, files: list[File] | None = None) -> None:
        """Give the kubelet a pod; by rename, since it reads whatever it finds."""
        name = manifest["metadata"]["name"]
        (self.guest.share / f"{name}.pod").write_text(json.dumps(manifest))
        script = ["set -e"]
        for file in files or []:
            (self.guest.share / file.path.name).write_text(file.text)
            script.append(f"install -D -m {file.mode:04o} /run/host/{file.path.name} {file.path}")
        script.append(f"cp /run/host/{name}.pod {_MANIFESTS}/.new; mv {_MANIFESTS}/.new {_MANIFESTS}/{name}.yaml")
        self.guest.run("\n".join(script))

    def plugin(self, manifests: list[Manifest]) -> None:
        """Give the kubelet the plugin's pod."""
        self.apply(*static_pod(manifests))

    def withdraw(self, *names: str) -> None:
        """Take pods back, and wait until nothing of them runs, and the kubelet has forgotten them."""
        uids = [pod["metadata"]["uid"] for name, pod in self.pods().items() if name in names]
        self.guest.run("rm -f " + " ".join(f"{_MANIFESTS}/{name}.yaml" for name in names))
        self.until(f"{', '.join(names)} are gone", lambda pods: not set(names) & set(pods))
        for uid in uids:
            self.guest.until("its cgroup is gone", f"! find /sys/fs/cgroup -name '*{uid}*' | grep -q .")

    def pods(self) -> dict[str, Manifest]:
        """The kubelet's pods, by name, with what it knows of their state."""
        listed = json.loads(self.guest.run(f"busybox wget -qO- {_KUBELET}/pods"))
        return {pod["metadata"]["name"].removesuffix(f"-{HOST_NAME}"): pod for pod in listed["items"] or ()}

    def until(self, what: str, condition: Callable[[dict[str, Manifest]], Any], seconds: float = 300) -> Any:
        """Look at the pods until the condition returns something true: that."""
        return self.guest.wait(what, lambda: condition(self.pods()), seconds)

    def until_ready(self, name: str) -> Manifest:
        """Wait until a pod's containers are ready: the pod."""

        def ready(pods: dict[str, Manifest]) -> Manifest | None:
            status = pods.get(name, {}).get("status", {})
            assert status.get("phase") != "Failed", status
            conditions = {each["type"]: each["status"] for each in status.get("conditions", ())}
            return pods[name] if conditions.get("Ready") == "True" else None

        pod: Manifest = self.until(f"{name} is ready", ready)
        return pod

    def until_running(self, pod: str, name: str) -> None:
        """Wait until a container runs, ready or not."""

        def running(pods: dict[str, Manifest]) -> bool:
            listed = pods.get(pod, {}).get("status", {}).get("containerStatuses", ())
            return any(each["name"] == name and "running" in each["state"] for each in listed)

        self.until(f"{name} of {pod} runs", running)

    def until_refused(self, name: str) -> tuple[str, str]:
        """Wait until the kubelet has refused a pod: reason and message."""

        def refused(pods: dict[str, Manifest]) -> tuple[str, str] | None:
            status = pods.get(name, {}).get("status", {})
            return (status["reason"], status.get("message", "")) if status.get("phase") == "Failed" else None

        found: tuple[str, str] = self.until(f"{name} is refused", refused)
        return found

    def resources(self, wish: str = "") -> dict[str, Any]:
        """What the kubelet's PodResources service says, once so many are allocatable (guest/pod_resources.py)."""
        said = self.guest.run(f"{PYTHON} {PROJECT}/tests/cluster/guest/pod_resources.py {wish}")
        return dict(json.loads(said.splitlines()[-1]))

    def container(self, pod: str, name: str) -> dict[str, Any]:
        """A container's status."""
        status = self.pods()[pod]["status"]
        (found,) = [
            each
            for each in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ()))
            if each["name"] == name
        ]
        return dict(found)

    def pid(self, pod: str, name: str) -> int:
        """A container's first process, as the guest sees it."""
        identity = self.container(pod, name)["containerID"].removeprefix("containerd://")
        return int(self.guest.run(f"ctr -n k8s.io tasks ls | awk '$1 == \"{identity}\" {{ print $2 }}'"))

    def execute(self, pod: str, name: str, *command: str, check: bool = True) -> str:
        """Run a command in a container, as kubectl exec does."""
        identity = self.container(pod, name)["containerID"].removeprefix("containerd://")
        words = shlex.join(command)
        return self.guest.run(f"ctr -n k8s.io tasks exec --exec-id exec-$RANDOM$RANDOM {identity} {words}", check=check)

    def python(self, pod: str, name: str, program: str, *arguments: str) -> str:
        """Run a program of in_pod/ in a container."""
        text = (PROJECT / "tests/cluster/in_pod" / program).read_text()
        return self.execute(pod, name, "python3", "-c", text, *arguments)

    def log(self, pod: str, name: str) -> str:
        """What a container's last run has printed."""
        path = f"/var/log/pods/*_{pod}-{HOST_NAME}_*/{name}"
        return self.guest.run(f"cd {path} && cut -d' ' -f4- \"$(ls -t | head -1)\"", check=False)

    def client(self, pod: str) -> dict[str, Any]:
        """What vfio_client.py has printed, in a workload that holds its VFs open by now."""

        def printed() -> dict[str, Any] | None:
            said = self.log(pod, "main")
            return dict(json.loads(said)) if said.startswith("{") and said.endswith("}\n") else None

        self.until_ready(pod)
        found: dict[str, Any] | None = self.guest.wait(f"{pod} holds its VFs", printed)
        assert found is not None
        return found

    def vfs(self) -> list[str]:
        """The VFs' addresses."""
        return self.guest.run("cd /sys/bus/pci/devices; ls -d */physfn").replace("/physfn", "").split()

    def group(self, address: str) -> int:
        """A function's IOMMU group."""
        return int(self.guest.run(f"basename $(readlink /sys/bus/pci/devices/{address}/iommu_group)"))

    def minor(self, address: str) -> int:
        """The minor number of its group's device file."""
        return int(self.guest.run(f"stat --format=%Lr /dev/vfio/{self.group(address)}"))

    def is_open(self, address: str) -> bool:
        """Whether some process has it open, as the kernel says."""
        return self.guest.run(f"cat /sys/bus/pci/devices/{address}/enable").strip() == "1"
