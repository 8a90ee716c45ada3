"""Node Feature Discovery on the guest's node, as its own manifests set it up, except that its two programs are no pods:
its kinds, its accounts with their roles, and a token for each of the programs. What can be configured is as it is by
default, but for the ports, of which the node has one set for both, and for more words in the logs."""

import shlex
from pathlib import Path
from typing import Any, Final

from cluster.cluster_node import PLANE, PROGRAMS, Cluster
from cluster.disk import BINARIES
from cluster.node import HOST_NAME, LABEL
from deployments.rendered import Manifest

MANIFESTS: Final = BINARIES / "nfd-manifests"
KINDS: Final = MANIFESTS / "nfd-crds"
HARDWARE: Final = LABEL.partition("=")[0]
_NAMESPACE: Final = "node-feature-discovery"
_FEATURES: Final = Path("/etc/kubernetes/node-feature-discovery/features.d")
_LOOK: Final = "example.feature.node.kubernetes.io/look"
_ECHO: Final[Manifest] = {
    "apiVersion": "nfd.k8s-sigs.io/v1alpha1",
    "kind": "NodeFeatureRule",
    "metadata": {"name": "echo"},
    "spec": {"rules": [{"name": "the number of the worker's look", "labels": {_LOOK: "@local.feature.look"}}]},
}
"""Shows what the master has acted on: all rules are evaluated at once, on all that one look has found."""


class FeatureDiscovery:
    """In a cluster where nobody else has set it up."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._looks = 0

    def start(self) -> None:
        """Its kinds and roles, and the master, which sees to it that all nodes have their labels."""
        self.cluster.run(
            f"set -e; kubectl apply -k {KINDS}; kubectl wait --for=condition=Established --timeout=600s crd --all\n"
            f"kubectl create namespace {_NAMESPACE}; kubectl apply -k {MANIFESTS / 'rbac'}"
        )
        for name in ("master", "worker"):
            token = f"kubectl -n {_NAMESPACE} create token nfd-{name} --duration=24h"
            admin, own = PLANE / "admin.conf", PLANE / f"nfd-{name}.conf"
            self.cluster.run(f'set -e; token=$({token}); sed "s/token: .*/token: $token/" {admin} >{own}')
        self._spawn("master", "-port=8081")

    def watch(self) -> None:
        """Start the worker as it runs on a node: it looks at its start and then once a minute."""
        self._spawn("worker", "-port=8082")

    def look(self) -> bool:
        """Let the worker look once, and wait until the master has acted on what it found, by every rule that there was
        before the first call: whether the node has the hardware label then."""
        self._looks += 1
        self.cluster.apply(_ECHO)
        self.cluster.guest.run(
            f"set -e; mkdir -p {_FEATURES}; printf '# +no-label\\nlook={self._looks}\\n' >{_FEATURES / 'look'}\n"
            f"{self._command('worker', '-oneshot')} >>/run/host/nfd-worker.log 2>&1"
        )
        acted = f"--for=jsonpath='{_path(_LOOK)}'={self._looks} node/{HOST_NAME}"
        self.cluster.until_is(f"the master has acted on look {self._looks}", acted)
        return HARDWARE in self.labels()

    def forget(self) -> None:
        """Delete what the worker has found, as the cluster does when the worker's DaemonSet is."""
        self.cluster.run(f"kubectl -n {_NAMESPACE} delete --wait --timeout=600s nodefeature {HOST_NAME}")

    def labels(self) -> dict[str, str]:
        """The node's."""
        return dict(self._metadata()["labels"])

    def owned(self) -> set[str]:
        """The labels that the master has set, as it notes on the node; its own namespace is left out there."""
        return set(self._metadata().get("annotations", {}).get("nfd.node.kubernetes.io/feature-labels", "").split(","))

    def until_labelled(self) -> None:
        """Wait until the node has the hardware label."""
        name, _, value = LABEL.partition("=")
        self.cluster.until_is("the node is labelled", f"--for=jsonpath='{_path(name)}'={value} node/{HOST_NAME}")

    def until_not_labelled(self) -> None:
        """Wait until it has not."""
        self.cluster.wait("the node is not labelled", lambda: HARDWARE not in self.labels())

    def remove(self) -> None:
        """All of it, and the labels that it has set."""
        self.cluster.guest.run(f"systemctl stop nfd-worker nfd-master 2>&1; rm -rf {_FEATURES}", check=False)
        if self.cluster.run("kubectl get crd -o name | grep nfd.k8s-sigs.io", check=False):
            self.cluster.guest.run(f"{self._command('master', '-prune')} >>/run/host/nfd-master.log 2>&1")
            self.cluster.run(
                f"set -e; kubectl delete --wait --timeout=600s -k {KINDS}\n"
                f"kubectl delete --ignore-not-found --wait --timeout=600s -k {MANIFESTS / 'rbac'}\n"
                f"kubectl delete --ignore-not-found --wait --timeout=600s namespace {_NAMESPACE}"
            )

    def _metadata(self) -> Any:
        return self.cluster.get(f"node {HOST_NAME}")["metadata"]

    def _command(self, name: str, *options: str) -> str:
        settings = (f"NODE_NAME={HOST_NAME}", f"KUBERNETES_NAMESPACE={_NAMESPACE}")
        kubeconfig = f"-kubeconfig={PLANE / f'nfd-{name}.conf'}"
        return shlex.join(["env", *settings, f"{PROGRAMS}/nfd-{name}", kubeconfig, "-v=2", *options])

    def _spawn(self, name: str, *options: str) -> None:
        log = f"--property=StandardOutput=append:/run/host/nfd-{name}.log --property=StandardError=inherit"
        # The program ends when it cannot reach the API server, and is started again, as a pod is.
        unit = f"--unit=nfd-{name} --collect --property=Restart=on-failure --property=RestartSec=3 {log}"
        self.cluster.guest.run(f"systemd-run {unit} {self._command(name, *options)} 2>&1")


def _path(label: str) -> str:
    """Where a node's label is, for kubectl."""
    escaped = label.replace(".", r"\.")
    return f"{{.metadata.labels.{escaped}}}"
