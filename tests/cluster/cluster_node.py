"""A cluster of one node, in one guest: the control plane beside the kubelet, and kubectl as a user has it."""

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from cluster import installation
from cluster.control_plane import LIMIT, ControlPlane
from cluster.machine import CommandError, Machine
from cluster.node import HOST_NAME, KubeletNode
from cluster.readme import install_commands
from deployments.rendered import Manifest
from kernel.machine import PROJECT
from qat_simulation.node.description import Node

_T = TypeVar("_T")
PLANE: Final = Path("/run/layer/plane")
PROGRAMS: Final = Path("/run/layer/bin")
_ADDRESS: Final = "10.99.0.1"
_SHELL: Final = f"export KUBECONFIG={PLANE}/admin.conf PATH={PROGRAMS}:$PATH; cd {PROJECT}\n"
"""What a user's shell has."""
_BASE: Final = "deployments/base"
_PAUSE: Final = 1.0
"""Between two questions: kubectl is a large program, and what is waited for needs the processors, too."""


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Show at the end how long this took."""
    began = time.monotonic()
    yield
    installation.lines.append(f"{name}: {time.monotonic() - began:.1f} s")


class Cluster:
    """The guest's cluster; `node` has the means for its node."""

    def __init__(self, guest: Machine) -> None:
        self.guest = guest
        self.node = KubeletNode(guest)
        self._applied = ""
        self._installed: tuple[Node, str] | None = None

    def start(self) -> None:
        """Start all, until the node is Ready."""
        plane = ControlPlane(PLANE, PROGRAMS, _ADDRESS)
        target = self.guest.share / "plane"
        target.mkdir()
        plane.write(target)
        # An address of the node's own, as every node has one; what the examples' README says that DPDK needs of it.
        self.guest.run(
            "sysctl -q vm.nr_hugepages=512\n"
            f"set -e; cp -r /run/host/plane {PLANE}; ip link add node type dummy\n"
            f"ip address add {_ADDRESS}/24 dev node; ip link set node up; ip route add default via 10.99.0.254 dev node"
        )
        with step("etcd and the API server started, until it says that it is ready"):
            for name, command in plane.commands().items():
                log = f"append:/run/host/{name}.log"
                unit = f"--unit={name} --property=Restart=on-failure --property=StandardOutput={log}"
                self.guest.run(f"systemd-run {unit} --property=StandardError=inherit {shlex.join(command)} 2>&1")
            self.until("the API server is ready", "kubectl get --raw=/readyz")
        options = f"--kubeconfig={PLANE}/node.conf --node-ip={_ADDRESS}"
        drop_in = "/etc/systemd/system/kubelet.service.d"
        with step("containerd and the kubelet started, until the node is Ready"):
            self.guest.run(
                # The API server asks the kubelet for logs and exec, at the node's address.
                "set -e; sed -i 's/^address: .*/address: 0.0.0.0/' /etc/kubernetes/kubelet.yaml\n"
                f"mkdir -p {drop_in}; printf '[Service]\\nEnvironment=\"KUBELET_OPTIONS={options}\"\\n' "
                f">{drop_in}/cluster.conf; systemctl daemon-reload; systemctl enable --now containerd kubelet 2>&1"
            )
            self.until_is("the node is Ready", f"--for=condition=Ready node/{HOST_NAME}")
            self.until("accounts are made", "kubectl get serviceaccount default")

    def run(self, script: str, check: bool = True) -> str:
        """A user's commands, in the project's folder."""
        return self.guest.run(_SHELL + script, check=check, seconds=LIMIT)

    def until(self, what: str, script: str) -> str:
        """A user's commands, again and again until they succeed."""
        return self.guest.until(what, _SHELL + script, LIMIT)

    def until_is(self, what: str, words: str) -> None:
        """`kubectl wait`, which looks without asking again and again, until it succeeds."""
        self.until(what, f"kubectl wait --timeout=60s {words}")

    def wait(self, what: str, condition: Callable[[], _T]) -> _T:
        """Wait until a condition, which asks the cluster and may fail at that, is true: what it returned."""

        def asked() -> _T | None:
            with contextlib.suppress(CommandError, json.JSONDecodeError):
                if found := condition():
                    return found
            time.sleep(_PAUSE)
            return None

        found = self.guest.wait(what, asked, LIMIT)
        assert found is not None
        return found

    def get(self, what: str) -> Any:
        """An object, or a list of objects, as the API server has it."""
        # Standard error apart: kubectl warns there.
        return json.loads(self.run(f"kubectl get {what} -o json 2>/dev/null"))

    def apply(self, *manifests: Manifest) -> None:
        """Apply manifests."""
        path = self.guest.share / "manifests.json"
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}))
        self.run("kubectl apply -f /run/host/manifests.json")

    def install(self, devices: Node, directory: str = _BASE) -> str:
        """Put in these devices, and the plugin by the README's commands, with this folder in place of the base: what
        the last command, which shows the node, printed once it has rolled out. The very same are left as they are.

        The README's first command is not for here: images are on the node (disk.py has built them, by what that command
        runs), and there is no registry to push them to."""
        images, *commands, describe = (command.replace("NODE", HOST_NAME) for command in install_commands())
        assert images == "make images"
        if self._installed != (devices, directory):
            self.clear()
            self.node.devices(devices)
            assert any(_BASE in command for command in commands)
            self._applied = directory
            for command in commands:
                self.run(command.replace(_BASE, directory))
            self.until_rolled_out()
            self._installed = (devices, directory)
        return self.run(describe)

    def clear(self) -> None:
        """No plugin and no workloads."""
        self.delete("--all")
        self._installed = None
        if self._applied:
            # With the namespace, so until its pods are gone.
            self.run(f"kubectl delete --ignore-not-found --wait --timeout=600s -k {self._applied}")
            self._applied = ""

    def plugin(self) -> str:
        """The one plugin pod that is not being ended: its name; "" while there is none."""
        pods = self.get("pods -n qat-plugin")["items"]
        names = [each["metadata"]["name"] for each in pods if "deletionTimestamp" not in each["metadata"]]
        return str(names[0]) if len(names) == 1 else ""

    def until_rolled_out(self) -> str:
        """Wait until the DaemonSet's pod is there, is the newest, and is ready: its name."""
        self.until("the DaemonSet is rolled out", "kubectl -n qat-plugin rollout status ds/qat-plugin --timeout=60s")
        name = self.wait("the plugin's pod is there", self.plugin)
        self.until_is("the plugin's pod is ready", f"-n qat-plugin --for=condition=Ready pod/{name}")
        return name

    def until_replaced(self, old: str) -> str:
        """Wait until a plugin pod is gone, and another is ready: its name."""
        self.until_is(f"{old} is gone", f"-n qat-plugin --for=delete pod/{old}")
        return self.until_rolled_out()

    def until_allocatable(self, **wanted: int) -> None:
        """Wait until the node's status says so, of our resources and of no other of ours."""

        for name, number in wanted.items():
            value = f"{{.status.allocatable.qat\\.intel\\.com/{name}}}={number}"
            self.until_is(f"{number} of {name} are allocatable", f"--for=jsonpath='{value}' node/{HOST_NAME}")

        def reached() -> bool:
            found = self.get(f"node {HOST_NAME}")["status"]["allocatable"]
            ours = {name.partition("/")[2]: int(number) for name, number in found.items() if name.startswith("qat.")}
            return {name: number for name, number in ours.items() if number} == wanted

        self.wait(f"allocatable is {wanted}", reached)

    def client(self, pod: str) -> dict[str, Any]:
        """What vfio_client.py has printed in a pod, which holds its VFs open by now."""
        self.until_is(f"{pod} is ready", f"--for=condition=Ready pod/{pod}")

        def printed() -> dict[str, Any] | None:
            said = self.run(f"kubectl logs {pod}")
            return dict(json.loads(said)) if said.endswith("}\n") else None

        return self.wait(f"{pod} holds its VFs", printed) or {}

    def unscheduled(self, pod: str) -> str:
        """Wait until the scheduler has found no place for a pod: why."""
        self.until_is(f"the scheduler has looked at {pod}", f"--for=condition=PodScheduled=False pod/{pod}")
        (condition,) = (
            each for each in self.get(f"pod {pod}")["status"]["conditions"] if each["type"] == "PodScheduled"
        )
        return f"{condition['reason']}: {condition['message']}"

    def delete(self, *names: str) -> None:
        """Delete pods of the default namespace, and wait until they are gone."""
        self.run(f"kubectl delete --now --wait --timeout=600s pod {' '.join(names)}")
