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
from deployments.rendered import Manifest
from kernel.machine import PROJECT

_T = TypeVar("_T")
_PLANE: Final = Path("/run/layer/plane")
_ADDRESS: Final = "10.99.0.1"
PROFILE: Final = f"export KUBECONFIG={_PLANE}/admin.conf PATH=/run/layer/bin:$PATH; cd {PROJECT}; "
"""What a user's shell has."""


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

    def start(self) -> None:
        """Start all, until the node is Ready."""
        plane = ControlPlane(_PLANE, Path("/run/layer/bin"), _ADDRESS)
        target = self.guest.share / "plane"
        target.mkdir()
        plane.write(target)
        # An address of the node's own, as every node has one.
        self.guest.run(
            f"set -e; cp -r /run/host/plane {_PLANE}; ip link set lo up; ip link add node type dummy\n"
            f"ip address add {_ADDRESS}/24 dev node; ip link set node up; ip route add default via 10.99.0.254 dev node"
        )
        with step("etcd and the API server started, until it says that it is ready"):
            for name, command in plane.commands().items():
                log = f"append:/run/host/{name}.log"
                unit = f"--unit={name} --property=Restart=on-failure --property=StandardOutput={log}"
                self.guest.run(f"systemd-run {unit} --property=StandardError=inherit {shlex.join(command)}")
            self.until("the API server is ready", "kubectl get --raw=/readyz", LIMIT)
        options = f"--kubeconfig={_PLANE}/node.conf --node-ip={_ADDRESS}"
        drop_in = "/etc/systemd/system/kubelet.service.d"
        with step("containerd and the kubelet started, until the node is Ready"):
            self.guest.run(
                # The API server asks the kubelet for logs and exec, at the node's address.
                "set -e; sed -i 's/^address: .*/address: 0.0.0.0/' /etc/kubernetes/kubelet.yaml; "
                f"mkdir -p {drop_in}; printf '[Service]\\nEnvironment=\"KUBELET_OPTIONS={options}\"\\n' "
                f">{drop_in}/cluster.conf; systemctl daemon-reload; systemctl enable --now containerd kubelet 2>&1"
            )
            self.until("the node is Ready", f"kubectl wait --for=condition=Ready --timeout=5s node/{HOST_NAME}", LIMIT)
            self.until("accounts are made", "kubectl get serviceaccount default")

    def run(self, script: str, check: bool = True) -> str:
        """A user's commands, in the project's folder."""
        return self.guest.run(PROFILE + script, check=check, seconds=LIMIT)

    def until(self, what: str, script: str, seconds: float = LIMIT) -> str:
        """A user's commands, again and again until they succeed."""
        return self.guest.until(what, PROFILE + script, seconds)

    def get(self, what: str) -> Any:
        """An object, or a list of objects, as the API server has it."""
        # Standard error apart: kubectl warns there.
        return json.loads(self.run(f"kubectl get {what} -o json 2>/dev/null"))

    def apply(self, manifest: Manifest) -> None:
        """Apply one manifest."""
        path = self.guest.share / "manifest.json"
        path.write_text(json.dumps(manifest))
        self.run("kubectl apply -f /run/host/manifest.json")

    def plugin(self) -> str:
        """The one plugin pod that is not being ended: its name."""
        pods = self.get("pods -n qat-plugin")["items"]
        (name,) = [each["metadata"]["name"] for each in pods if "deletionTimestamp" not in each["metadata"]]
        return str(name)

    def until_rolled_out(self) -> None:
        """Wait until the DaemonSet's pod is there, is the newest, and is ready."""
        self.until("the DaemonSet is rolled out", "kubectl -n qat-plugin rollout status ds/qat-plugin --timeout=10s")
        self.wait(
            "one pod is ready on the node",
            lambda: self.get("daemonset -n qat-plugin qat-plugin")["status"].get("numberReady") == 1,
        )

    def until_allocatable(self, **wanted: int) -> None:
        """Wait until the node's status says so, of our resources and of no other of ours."""

        def reached() -> bool:
            found = self.get(f"node {HOST_NAME}")["status"]["allocatable"]
            ours = {name.partition("/")[2]: int(number) for name, number in found.items() if name.startswith("qat.")}
            return {name: number for name, number in ours.items() if number} == wanted

        self.wait(f"allocatable is {wanted}", reached)

    def client(self, pod: str) -> dict[str, Any]:
        """What vfio_client.py has printed in a pod."""
        self.run(f"kubectl wait --for=condition=Ready --timeout=300s pod/{pod}")

        def printed() -> dict[str, Any] | None:
            said = self.run(f"kubectl logs {pod}", check=False)
            return dict(json.loads(said)) if said.startswith("{") and said.endswith("}\n") else None

        return self.wait(f"{pod} holds its VFs", printed) or {}

    def delete(self, *names: str) -> None:
        """Delete pods of the default namespace, and wait until they are gone."""
        self.run(f"kubectl delete --now --ignore-not-found --wait --timeout=300s pod {' '.join(names)}")

    def remove(self, directory: str) -> None:
        """Delete what a kustomization has made, and wait until it and its pods are gone."""
        self.run(f"kubectl delete --ignore-not-found --wait --timeout=500s -k {directory}")

    def wait(self, what: str, condition: Callable[[], _T]) -> _T:
        """Wait until a condition that asks the cluster is true."""

        def asked() -> _T | None:
            with contextlib.suppress(CommandError, json.JSONDecodeError):
                return condition()
            return None

        found = self.guest.wait(what, asked, LIMIT)
        assert found is not None
        return found
