"""A real API server keeps `kubectl exec` to the commands that read once the hardened overlay is applied.

There is no node. So whatever admission lets pass fails in the next step: the pod has no host.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml

from cluster.control_plane import ControlPlane, KubectlError
from cluster.test_accepted import _plane
from deployments import rendered
from support.conditions import wait_until

_NAMESPACE: Final = "qat-plugin"
_POD: Final = "of-the-plugin"
_API: Final = f"/api/v1/namespaces/{_NAMESPACE}/pods/{_POD}"
_REFUSED: Final = 'only "qat-helper audit ..." and "qat-helper policy ..." may be executed in it'
_SERVER_REFUSED: Final = "a process of this container may use the helper"
_EPHEMERAL_REFUSED: Final = "ephemeral containers are not allowed here"
_IMAGE_REFUSED: Final = "the images of a running pod may not be changed here"
_PASSED: Final = f"pod {_POD} does not have a host assigned"

plane = pytest.fixture(scope="module")(_plane)


def _answer(plane: ControlPlane, *words: str | Path) -> str:
    """What kubectl says; a failure is an answer like any other."""
    try:
        return plane.kubectl("-n", _NAMESPACE, *words)
    except KubectlError as error:
        return str(error)


def _exec(plane: ControlPlane, container: str, *command: str) -> str:
    return _answer(plane, "exec", _POD, "-c", container, "--", *command)


def _with_ephemeral_container(plane: ControlPlane, directory: Path, target: str) -> str:
    """The answer to a request that would add one, as `kubectl debug` sends it; a dry run."""
    pod = json.loads(_answer(plane, "get", "pod", _POD, "-o", "json"))
    pod["spec"]["ephemeralContainers"] = [{"name": "debugger", "image": "busybox", "targetContainerName": target}]
    path = directory / "pod.json"
    path.write_text(json.dumps(pod))
    return _answer(plane, "replace", "--raw", f"{_API}/ephemeralcontainers?dryRun=All", "-f", path)


def _with_image(plane: ControlPlane, kind: str, container: str) -> str:
    """The answer to another image for a container; a dry run."""
    patch = {"spec": {kind: [{"name": container, "image": "example.invalid/other"}]}}
    return _answer(plane, "patch", "pod", _POD, "--dry-run=server", "-p", json.dumps(patch))


def _apply_pod(plane: ControlPlane, directory: Path) -> None:
    (daemon_set,) = rendered.of_kind(rendered.render("overlays/hardened"), "DaemonSet")
    template = daemon_set["spec"]["template"]
    metadata = {**template["metadata"], "name": _POD, "namespace": _NAMESPACE}
    path = directory / "pod.yaml"
    path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}))
    plane.kubectl("-n", _NAMESPACE, "wait", "--for=create", "--timeout=300s", "serviceaccount/qat-plugin")
    plane.kubectl("apply", "-f", path)


@pytest.fixture(scope="module")
def hardened(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The hardened overlay, once its policies are in force, and a pod of its template."""
    directory = tmp_path_factory.mktemp("pod")
    plane.kubectl("apply", "--validate=strict", "-k", "deployments/base")
    _apply_pod(plane, directory)
    assert _PASSED in _exec(plane, "helper", "sh"), "the base has no such policies"
    assert '"debugger"' in _with_ephemeral_container(plane, directory, "helper"), "nor against these"
    assert "patched" in _with_image(plane, "initContainers", "helper"), "nor against this"
    plane.kubectl("apply", "--validate=strict", "-k", "deployments/overlays/hardened")
    wait_until(lambda: _REFUSED in _exec(plane, "helper", "sh"), 600)
    wait_until(lambda: _EPHEMERAL_REFUSED in _with_ephemeral_container(plane, directory, "helper"), 600)
    wait_until(lambda: _IMAGE_REFUSED in _with_image(plane, "initContainers", "helper"), 600)
    yield plane


@pytest.mark.parametrize(
    "command",
    [
        ("sh",),
        ("python3", "-c", "pass"),
        ("qat-helper",),
        ("qat-helper", "audit"),
        ("qat-helper", "--socket=/tmp/x", "audit"),
        ("/tmp/qat-helper", "audit", "verify"),
        ("env", "PYTHONPATH=/tmp", "qat-helper", "audit", "verify"),
    ],
)
def test_other_commands_are_refused_in_the_helpers_container(hardened: ControlPlane, command: tuple[str, ...]) -> None:
    assert _REFUSED in _exec(hardened, "helper", *command)


@pytest.mark.parametrize(
    "command", [("qat-helper", "audit", "verify"), ("qat-helper", "policy", "check", "/etc/qat-plugin/policy")]
)
def test_the_commands_that_read_pass_admission(hardened: ControlPlane, command: tuple[str, ...]) -> None:
    assert _PASSED in _exec(hardened, "helper", *command)


def test_the_commands_that_look_pass_admission_in_the_servers_container(hardened: ControlPlane) -> None:
    assert _PASSED in _exec(hardened, "server", "qat-plugin", "status")
    assert _PASSED in _exec(hardened, "server", "qat-plugin", "config", "check", "/etc/qat-plugin/provisioning")
    assert _PASSED in _answer(hardened, "exec", _POD, "--", "qat-plugin", "doctor"), "kubectl names the default itself"
    assert _PASSED in _answer(hardened, "attach", _POD, "-c", "server"), "it has no standard input"


@pytest.mark.parametrize(
    "command", [("python3", "-c", "pass"), ("qat-plugin",), ("qat-plugin", "provision"), ("/tmp/qat-plugin", "status")]
)
def test_other_commands_are_refused_in_the_servers_container(hardened: ControlPlane, command: tuple[str, ...]) -> None:
    """Their process would have the uid that the helper serves, outside the server's sandbox."""
    assert _SERVER_REFUSED in _exec(hardened, "server", *command)


_OTHER_WAYS: Final[dict[str, Callable[[ControlPlane], str]]] = {
    "attach": lambda plane: _answer(plane, "attach", _POD, "-c", "helper"),
    "without a container's name": lambda plane: _answer(plane, "get", "--raw", f"{_API}/exec?command=sh&stdout=true"),
    "with an empty one": lambda plane: _answer(plane, "get", "--raw", f"{_API}/exec?container=&command=sh&stdout=true"),
    "by GET": lambda plane: _answer(plane, "get", "--raw", f"{_API}/exec?container=helper&command=sh&stdout=true"),
}


@pytest.mark.parametrize("way", _OTHER_WAYS)
def test_other_ways_to_the_helpers_container_are_refused(hardened: ControlPlane, way: str) -> None:
    assert _REFUSED in _OTHER_WAYS[way](hardened)


@pytest.mark.parametrize("target", ["helper", "server"])
def test_ephemeral_containers_are_refused(hardened: ControlPlane, tmp_path: Path, target: str) -> None:
    """Whichever container it targets: it could mount the pod's volumes."""
    assert _EPHEMERAL_REFUSED in _with_ephemeral_container(hardened, tmp_path, target)


@pytest.mark.parametrize(("kind", "container"), [("initContainers", "helper"), ("containers", "server")])
def test_images_of_a_running_pod_cannot_be_changed(hardened: ControlPlane, kind: str, container: str) -> None:
    assert _IMAGE_REFUSED in _with_image(hardened, kind, container)


def test_other_changes_of_a_running_pod_pass_admission(hardened: ControlPlane) -> None:
    assert "labeled" in _answer(hardened, "label", "pod", _POD, "--dry-run=server", "looked-at=yes")


def test_pods_of_other_namespaces_are_not_concerned(hardened: ControlPlane) -> None:
    answer = _answer(hardened, "get", "--raw", "/api/v1/namespaces/default/pods/any/exec?container=helper&command=sh")
    assert 'pods "any" not found' in answer
