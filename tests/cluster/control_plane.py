"""A control plane: etcd, the API server, the controllers, the scheduler, with certificates and ports of its own.

    with running(directory) as plane:                 # on this machine, without a kubelet: what is applied is stored
        plane.kubectl("apply", "-k", "deployments/base")

Users are known by tokens, the server by a certificate that is
made here; each kubeconfig is in `directory`. Pod Security admission is on, as are the other plugins
that are on by default.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from cluster.disk import BINARIES
from kernel.machine import PROJECT

PROGRAMS: Final = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
LIMIT: Final = 1200.0
_LOOK: Final = 0.3
_CONTROLLERS: Final = (
    *("namespace-controller", "serviceaccount-controller", "root-ca-certificate-publisher-controller"),
    *("garbage-collector-controller", "daemonset-controller", "node-lifecycle-controller"),
)
"""What the tests need, and no other: each costs the guest time."""
_USERS: Final = {
    "admin": ("admin", "system:masters"),
    "controllers": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "node": ("system:node:node", "system:nodes"),
}


class KubectlError(Exception):
    """A call of kubectl has failed: what it said."""


class Ports(Struct, frozen=True):
    """Where the programs listen."""

    api: int = 6443
    etcd: int = 2379
    peer: int = 2380
    controllers: int = 10257
    scheduler: int = 10259


def free_ports() -> Ports:
    """Ports that nobody has now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
    numbers = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return Ports(*numbers)


class ControlPlane(Struct, frozen=True):
    """`directory` has its files, `programs` the executables, both as where it runs sees them."""

    directory: Path
    programs: Path = BINARIES
    address: str = "127.0.0.1"
    ports: Ports = Ports()

    def write(self, target: Path) -> None:
        """Write certificates, keys, tokens and kubeconfigs into `target`, which is `directory` there."""
        _certificates(target, self.address)
        tokens = {name: secrets.token_hex(16) for name in _USERS}
        lines = [f'{tokens[name]},{user},{user},"{group}"' for name, (user, group) in _USERS.items()]
        (target / "tokens.csv").write_text("\n".join(lines) + "\n")
        for name, token in tokens.items():
            (target / f"{name}.conf").write_text(
                "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
                "clusters:\n- name: c\n  cluster:\n"
                f"    server: https://{self.address}:{self.ports.api}\n"
                f"    certificate-authority: {self.directory / 'ca.crt'}\n"
                f"users:\n- name: u\n  user:\n    token: {token}\n"
                "contexts:\n- name: c\n  context:\n    cluster: c\n    user: u\n"
            )

    def commands(self) -> dict[str, list[str]]:
        """What is started, in this order: it is up once the API server says so."""
        own, ports = self.directory, self.ports
        etcd = f"http://127.0.0.1:{ports.etcd}"
        peer = f"http://127.0.0.1:{ports.peer}"
        found = {
            "etcd": [
                *(f"--data-dir={own / 'etcd'}", "--unsafe-no-fsync", f"--listen-client-urls={etcd}"),
                *(f"--advertise-client-urls={etcd}", f"--listen-peer-urls={peer}"),
                *(f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}"),
            ],
            "kube-apiserver": [
                *(f"--etcd-servers={etcd}", f"--secure-port={ports.api}", f"--bind-address={self.address}"),
                *(f"--advertise-address={self.address}", "--endpoint-reconciler-type=none"),
                *("--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=Node,RBAC"),
                *(f"--tls-cert-file={own / 'api.crt'}", f"--tls-private-key-file={own / 'api.key'}"),
                *(f"--client-ca-file={own / 'ca.crt'}", f"--token-auth-file={own / 'tokens.csv'}"),
                *("--service-account-issuer=https://kubernetes.default.svc", "--profiling=false"),
                # What large clusters need, and a guest's two slow processors had better be spared.
                "--enable-priority-and-fairness=false",
                "--feature-gates=SizeBasedListCostEstimate=false,DetectCacheInconsistency=false",
                f"--service-account-key-file={own / 'accounts.pub'}",
                f"--service-account-signing-key-file={own / 'accounts.key'}",
                *("--enable-admission-plugins=NodeRestriction", "--kubelet-preferred-address-types=InternalIP"),
            ],
            "kube-controller-manager": [
                *(f"--kubeconfig={own / 'controllers.conf'}", "--leader-elect=false"),
                *("--use-service-account-credentials=true", f"--root-ca-file={own / 'ca.crt'}"),
                # A machine that stalls is not a node that is lost.
                *(f"--controllers={','.join(_CONTROLLERS)}", "--node-monitor-grace-period=15m"),
                f"--service-account-private-key-file={own / 'accounts.key'}",
                *(
                    "--bind-address=127.0.0.1",
                    f"--secure-port={ports.controllers}",
                    f"--cert-dir={own / 'controllers'}",
                ),
            ],
            "kube-scheduler": [
                *(f"--kubeconfig={own / 'scheduler.conf'}", "--leader-elect=false"),
                *("--bind-address=127.0.0.1", f"--secure-port={ports.scheduler}", f"--cert-dir={own / 'scheduler'}"),
            ],
        }
        return {name: [str(self.programs / name), *options] for name, options in found.items()}

    def environment(self) -> dict[str, str]:
        """For a user's commands: kubectl is the first on the path, and knows the cluster."""
        path = f"{self.programs}:{os.environ.get('PATH', '')}"
        own = {"KUBECONFIG": str(self.directory / "admin.conf"), "KUBECACHEDIR": str(self.directory / "cache")}
        return {**os.environ, **own, "PATH": path}

    def kubectl(self, *words: str | Path) -> str:
        """Run kubectl in the project's folder, on this machine: both its outputs. Raises KubectlError."""
        done = subprocess.run(
            [self.programs / "kubectl", *words],
            cwd=PROJECT,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(map(str, words))}: {done.stdout}")
        return done.stdout


@contextlib.contextmanager
def running(directory: Path) -> Iterator[ControlPlane]:
    """One on this machine, ready."""
    plane = ControlPlane(directory, ports=free_ports())
    plane.write(directory)
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, command in plane.commands().items():
            log = stack.enter_context((directory / f"{name}.log").open("wb"))
            processes[name] = stack.enter_context(_ended(subprocess.Popen(command, stdout=log, stderr=log)))
        deadline = time.monotonic() + LIMIT
        while True:
            with contextlib.suppress(KubectlError):
                plane.kubectl("get", "--raw=/readyz")
                plane.kubectl("get", "serviceaccount", "default")
                break
            for name, process in processes.items():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no control plane: {name}:\n{(directory / f'{name}.log').read_text()[-3000:]}")
            time.sleep(_LOOK)
        yield plane


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _certificates(target: Path, address: str) -> None:
    """An authority, the API server's certificate of it, and the key that service accounts' tokens are signed with."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=target, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-days", "3650", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.crt")
    openssl("req", *key, "-subj", "/CN=api", "-keyout", "api.key", "-out", "api.csr")
    (target / "names").write_text(f"subjectAltName=IP:{address},IP:127.0.0.1,IP:10.96.0.1\n")
    authority = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "3650")
    openssl("x509", "-req", "-in", "api.csr", *authority, "-extfile", "names", "-out", "api.crt")
    openssl("genrsa", "-out", "accounts.key", "2048")
    openssl("rsa", "-in", "accounts.key", "-pubout", "-out", "accounts.pub")
