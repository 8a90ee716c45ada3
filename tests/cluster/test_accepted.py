"""A real API server takes what users apply: every overlay, combination and example, validated strictly, with Pod
Security admission. It runs on this machine, without a node: what is applied is stored, and the controllers act on
it."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml

from cluster import control_plane, disk
from cluster.control_plane import ControlPlane, KubectlError
from cluster.readme import install_commands
from deployments import rendered
from deployments.rendered import BUILT, COMPONENTS, DEPLOYMENTS, EXAMPLES, INSTALLATIONS

_NAMESPACE: Final = "qat-plugin"
_FOREIGN: Final = {
    "overlays/nfd": "NodeFeatureRule",
    "overlays/openshift": "SecurityContextConstraints",
    "overlays/monitoring": "PodMonitor",
}
"""Kinds that others define: without them, the API server refuses that object."""
_ANY: Final = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
_CONSTRAINTS: Final = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "securitycontextconstraints.security.openshift.io"},
    "spec": {
        "group": "security.openshift.io",
        "scope": "Cluster",
        "names": {
            "kind": "SecurityContextConstraints",
            "plural": "securitycontextconstraints",
            "singular": "securitycontextconstraints",
            "listKind": "SecurityContextConstraintsList",
        },
        "versions": [{"name": "v1", "served": True, "storage": True, "schema": _ANY}],
    },
}


def _plane() -> Iterator[ControlPlane]:
    for tool in ("etcd", "kube-apiserver", "nfd-manifests"):
        if not (disk.BINARIES / tool).exists():
            pytest.skip(f"{tool} has not been built: make test-cluster builds it")
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl: tests/cluster/prepare installs it where apt-get is")
    with (
        tempfile.TemporaryDirectory(prefix="qat-plane-") as directory,
        control_plane.running(Path(directory)) as started,
    ):
        yield started


plane = pytest.fixture(scope="module")(_plane)
new_plane = pytest.fixture(_plane)
"""One that nothing has been defined in."""


@pytest.fixture
def kinds(plane: ControlPlane, tmp_path: Path) -> None:
    """The definitions of others' kinds: PodMonitor and NodeFeatureRule are their projects' own, so their fields are
    checked; SecurityContextConstraints take any fields, so of those only that they come is tried."""
    plane.kubectl("apply", "--server-side", "-f", BUILT / "podmonitors.yaml")
    plane.kubectl("apply", "-k", disk.BINARIES / "nfd-manifests/nfd-crds")
    path = tmp_path / "constraints.yaml"
    path.write_text(yaml.safe_dump(_CONSTRAINTS))
    plane.kubectl("apply", "-f", path)
    plane.kubectl("wait", "--for=condition=Established", "--timeout=300s", "crd", "--all")


def _apply(plane: ControlPlane, directory: str | Path) -> str:
    said = plane.kubectl("apply", "--validate=strict", "-k", directory)
    # Pod Security's warnings at "baseline" name the host's directories, and the helper's Unconfined.
    for line in said.splitlines():
        assert re.search(r" (created|configured|unchanged)$", line) or line.startswith("Warning: "), line
    return said


def _remove(plane: ControlPlane, directory: str | Path) -> None:
    plane.kubectl("delete", "--ignore-not-found", "--wait", "--timeout=300s", "-k", directory)


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize("name", INSTALLATIONS)
def test_an_installation_is_taken(plane: ControlPlane, name: str) -> None:
    directory = f"deployments/{name}"
    said = _apply(plane, directory)
    assert len([line for line in said.splitlines() if not line.startswith("Warning: ")]) == len(rendered.render(name))
    for warning in (line for line in said.splitlines() if line.startswith("Warning: ")):
        assert "hostPath volumes" in warning, warning
        assert ("AppArmor" in warning or "forbidden AppArmor" in warning) == (name != "overlays/hardened"), warning
        assert "privileged" not in warning.split(":", 2)[-1], warning
    # It is stored as it was written: applied again, nothing changes.
    again = [line for line in _apply(plane, directory).splitlines() if not line.startswith("Warning: ")]
    assert [line for line in again if not line.endswith(" unchanged")] == []
    # The DaemonSet's controller has taken it, and no node has the hardware label.
    plane.kubectl(
        *("-n", _NAMESPACE, "wait", "--for=jsonpath={.status.observedGeneration}=1", "--timeout=300s"),
        "daemonset/qat-plugin",
    )
    _remove(plane, directory)


@pytest.mark.usefixtures("kinds")
def test_the_fields_of_others_kinds_are_checked(plane: ControlPlane, tmp_path: Path) -> None:
    """Where they are known (above): a wrong one is refused, so those of an installation that is taken are right."""
    for name, part, wrong in (
        ("overlays/nfd", "rules", "matchFeature"),
        ("overlays/monitoring", "podMetricsEndpoints", "portt"),
    ):
        (manifest,) = rendered.of_kind(rendered.render(name), _FOREIGN[name])
        manifest["spec"][part][0][wrong] = []
        path = tmp_path / "wrong.yaml"
        path.write_text(yaml.safe_dump(manifest))
        with pytest.raises(KubectlError, match=f'strict decoding error: unknown field "spec.{part}.*{wrong}"'):
            plane.kubectl("create", "--validate=strict", "--dry-run=server", "-f", path)


@pytest.mark.usefixtures("kinds")
def test_all_components_together_are_taken(plane: ControlPlane) -> None:
    with tempfile.TemporaryDirectory(prefix="combined-", dir=BUILT) as directory:
        # `vm` and `hardened` are of one pod; `openshift` replaces what `hardened` leaves.
        rendered.combined(Path(directory), COMPONENTS, "namespace: inteldeviceplugins-system")
        _apply(plane, Path(directory))
        _remove(plane, Path(directory))


def test_without_others_kinds_only_theirs_is_refused(new_plane: ControlPlane) -> None:
    for name, kind in _FOREIGN.items():
        with pytest.raises(KubectlError, match=f'no matches for kind "{kind}"'):
            _apply(new_plane, f"deployments/{name}")
        _remove(new_plane, "deployments/base")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_taken_at_its_level_and_not_above(plane: ControlPlane, name: str) -> None:
    """Of Pod Security, as the examples' README says."""
    for pod in rendered.of_kind(rendered.render(name), "Pod"):
        if runtime := pod["spec"].get("runtimeClassName"):  # admission looks for it
            _runtime_class(plane, runtime)
    level = _level(name)
    stricter = {"restricted": None, "privileged": "baseline"}[level]
    for enforced in filter(None, (level, stricter)):
        namespace = f"{enforced}-{re.sub('[^a-z]', '-', name)}"
        plane.kubectl("create", "namespace", namespace)
        plane.kubectl("label", "namespace", namespace, f"pod-security.kubernetes.io/enforce={enforced}")
        plane.kubectl("-n", namespace, "wait", "--for=create", "--timeout=300s", "serviceaccount/default")
        words = ("-n", namespace, "apply", "--validate=strict", "-k", f"deployments/{name}")
        if enforced == level:
            plane.kubectl(*words)
        else:
            with pytest.raises(KubectlError, match=r'violates PodSecurity.*"IPC_LOCK"'):
                plane.kubectl(*words)
        plane.kubectl("delete", "namespace", namespace, "--wait", "--timeout=300s")


def _level(name: str) -> str:
    """What the table in the examples' README says."""
    text = (DEPLOYMENTS / "examples/README.md").read_text()
    found = re.search(rf"^\| `{re.escape(name.removeprefix('examples/'))}` \|.*\| (\w+) \|$", text, re.MULTILINE)
    assert found is not None, name
    return found[1]


def _runtime_class(plane: ControlPlane, name: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(f"apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {{name: {name}}}\nhandler: {name}\n")
        file.flush()
        plane.kubectl("apply", "-f", Path(file.name))


def test_the_readmes_commands_name_what_is_there() -> None:
    commands = install_commands()
    assert commands[0] == "make images"
    assert [word for command in commands for word in command.split() if word.startswith("deployments/")] != []
    for command in commands:
        for word in command.partition("#")[0].split():
            assert not word.startswith("deployments/") or (DEPLOYMENTS.parent / word).is_dir()
