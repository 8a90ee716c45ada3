"""No privilege in any manifest but what has a reason; and the checks themselves find each thing that they are for."""

import copy
import os
from collections.abc import Callable
from typing import Any, Final

import pytest

from deployments import policies, rendered
from deployments.rendered import COMPONENTS, EXAMPLES, INSTALLATIONS
from qat_helper.options import parse as helper_options
from qat_server.command_line import flags, settings

pytestmark = pytest.mark.usefixtures("kustomize")

Spec = dict[str, Any]


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_an_installation_keeps_our_rules(name: str) -> None:
    assert list(policies.ours(rendered.pod_spec(rendered.render(name)))) == []


def test_all_components_together_keep_our_rules(tmp_path: Any) -> None:
    assert list(policies.ours(rendered.pod_spec(rendered.combined(tmp_path, COMPONENTS)))) == []


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_both_containers_require_their_sandbox(name: str) -> None:
    """As the programs read the variables; in all installations but the one for kernels without Landlock."""
    spec = rendered.pod_spec(rendered.render(name))
    given_up = ["helper", "server"] if name == "overlays/without_landlock" else []
    assert [line.partition(":")[0] for line in policies.sandbox(spec)] == given_up
    with pytest.MonkeyPatch.context() as patch:
        for each in ("helper", "server"):
            for variable in rendered.container(spec, each)["env"]:
                if "value" in variable:
                    patch.setenv(variable["name"], variable["value"])
        server = settings.parse(flags.from_environment(os.environ))
        required = (helper_options([]).require_sandbox, server.require_sandbox)
    assert required == (not given_up, not given_up)


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_what_an_installation_has_beyond_baseline(name: str) -> None:
    """hostPath in all; AppArmor's exception for the helper in all but the hardened one; OpenShift's SELinux type."""
    found = [line for line in policies.baseline(rendered.pod_spec(rendered.render(name))) if "hostPath" not in line]
    apparmor = ["helper has appArmorProfile Unconfined"]
    selinux = [f"{which} has SELinux type container_device_plugin_t" for which in ("helper", "server")]
    expected = [] if name == "overlays/hardened" else apparmor
    assert sorted(found) == sorted(expected + (selinux if name == "overlays/openshift" else []))


@pytest.mark.parametrize("name", [name for name in INSTALLATIONS if name != "overlays/openshift"])
def test_the_server_alone_is_restricted_but_for_its_directory(name: str) -> None:
    spec = rendered.pod_spec(rendered.render(name))
    mounts = {mount["name"] for mount in rendered.container(spec, "server")["volumeMounts"]}
    alone = {**spec, "initContainers": [], "volumes": [each for each in spec["volumes"] if each["name"] in mounts]}
    (line,) = policies.restricted(alone)
    assert line.startswith("volume own-")
    assert line.endswith("is a hostPath")


def test_the_hardened_helper_lacks_restricted_by_uid_0_alone() -> None:
    lines = list(policies.restricted(rendered.pod_spec(rendered.render("overlays/hardened"))))
    assert [line for line in lines if "hostPath" not in line] == ["helper may run as root"]


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_what_else_an_installation_makes(name: str) -> None:
    manifests = rendered.render(name)
    for account in rendered.of_kind(manifests, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert rendered.of_kind(manifests, "ClusterRole") == []
    assert rendered.of_kind(manifests, "ClusterRoleBinding") == []
    assert rendered.of_kind(manifests, "Secret") == []
    (policy,) = rendered.of_kind(manifests, "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy["spec"]
    for role in rendered.of_kind(manifests, "Role"):
        assert [rule["verbs"] for rule in role["rules"]] == [["use"]]  # of OpenShift's constraint


def test_the_security_context_constraint_allows_what_the_pod_asks_and_no_more() -> None:
    manifests = rendered.render("overlays/openshift")
    (scc,) = rendered.of_kind(manifests, "SecurityContextConstraints")
    spec = rendered.pod_spec(manifests)
    used = {next(kind for kind in volume if kind != "name") for volume in spec["volumes"]}
    assert used <= set(scc["volumes"]) == {"configMap", "emptyDir", "hostPath"}
    allowed = {key: value for key, value in scc.items() if key.startswith("allow") and value}
    assert allowed == {"allowHostDirVolumePlugin": True}
    assert scc["seLinuxContext"]["seLinuxOptions"] == spec["securityContext"]["seLinuxOptions"]
    assert scc["requiredDropCapabilities"] == ["ALL"]
    assert scc["defaultAddCapabilities"] == []
    (role,) = rendered.of_kind(manifests, "Role")
    assert role["rules"][0]["resourceNames"] == [scc["metadata"]["name"]]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_asks_for_the_capabilities_that_it_needs(name: str) -> None:
    """SYS_NICE opens the runtime's seccomp profile for the calls that DPDK's memory needs; see tests/cluster."""
    needed = {"dpdk": "IPC_LOCK, SYS_NICE", "openssl": "IPC_LOCK"}.get(name.split("/")[1])
    for manifest in rendered.render(name):
        lines = list(policies.baseline(manifest["spec"]))
        assert lines == ([f"main adds capabilities: {needed}"] if needed else [])
        assert manifest["spec"]["automountServiceAccountToken"] is False


def test_the_minimal_example_is_restricted() -> None:
    (pod,) = rendered.render("examples/minimal")
    assert list(policies.restricted(pod["spec"])) == []


def _set(*path: Any, value: Any) -> Callable[[Spec], None]:
    def change(spec: Spec) -> None:
        place: Any = spec
        for step in path[:-1]:
            place = place[step]
        if isinstance(place, list) and path[-1] == "+":
            place.append(value)
        else:
            place[path[-1]] = value

    return change


_HELPER: Final = ("initContainers", 0)
_SERVER: Final = ("containers", 0)
_CONTEXT: Final = "securityContext"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_set(*_HELPER, _CONTEXT, "privileged", value=True), "helper: privileged is True"),
        (_set(*_SERVER, _CONTEXT, "allowPrivilegeEscalation", value=True), "server: allowPrivilegeEscalation is True"),
        (_set(*_SERVER, _CONTEXT, "readOnlyRootFilesystem", value=None), "server: readOnlyRootFilesystem is None"),
        (_set(*_SERVER, _CONTEXT, "runAsUser", value=0), "server: runAsUser is 0"),
        (_set(*_SERVER, _CONTEXT, "runAsNonRoot", value=False), "server: runAsNonRoot is False"),
        (_set(*_HELPER, _CONTEXT, "runAsGroup", value=0), "helper: runAsGroup is 0"),
        (_set(*_HELPER, _CONTEXT, "capabilities", "add", value=["SYS_ADMIN"]), "helper: capabilities are"),
        (_set(*_SERVER, _CONTEXT, "capabilities", value={}), "server: capabilities are"),
        (_set("securityContext", value={}), "no seccomp profile"),
        (_set(*_SERVER, _CONTEXT, "seccompProfile", value={"type": "Unconfined"}), "server: no seccomp profile"),
        (_set(*_SERVER, _CONTEXT, "appArmorProfile", value={"type": "Unconfined"}), "server: AppArmor Unconfined"),
        (_set("automountServiceAccountToken", value=True), "token is mounted"),
        (_set("hostNetwork", value=True), "hostNetwork is set"),
        (_set("hostPID", value=True), "hostPID is set"),
        (_set("shareProcessNamespace", value=True), "shareProcessNamespace is set"),
        (_set("containers", "+", value={"name": "more"}), "other containers"),
        (
            _set(*_SERVER, "volumeMounts", "+", value={"name": "sys-devices", "mountPath": "/sys/devices"}),
            "server: mounts the host's",
        ),
        (_set("volumes", 0, "hostPath", "path", value="/etc"), "helper: mounts the host's /etc, which has no reason"),
        (_set(*_HELPER, "volumeMounts", 2, "readOnly", value=False), "mounts /sys/kernel/debug to write"),
        (_set(*_HELPER, "volumeMounts", 0, "mountPath", value="/mnt"), "mounts /sys/bus/pci elsewhere"),
        (_set(*_HELPER, "volumeMounts", 0, "mountPropagation", value="Bidirectional"), "mount propagation"),
        (_set(*_SERVER, "volumeMounts", 1, "readOnly", value=False), "may replace the helper's socket"),
        (_set("volumes", "+", value={"name": "x", "hostPath": {"path": "/"}}), "volume x is not used"),
        (_set(*_SERVER, "resources", "limits", value={"cpu": 1}), "server: no limits for memory"),
        (_set(*_SERVER, "ports", 0, "hostPort", value=9090), "server: a hostPort"),
    ],
)
def test_each_rule_of_ours_is_noticed_when_broken(change: Callable[[Spec], None], sentence: str) -> None:
    spec = copy.deepcopy(rendered.pod_spec(rendered.render("base")))
    change(spec)
    assert any(sentence in line for line in policies.ours(spec)), list(policies.ours(spec))


@pytest.mark.parametrize(
    ("level", "change", "sentence"),
    [
        (policies.baseline, _set("hostIPC", value=True), "hostIPC"),
        (policies.baseline, _set("volumes", value=[{"name": "v", "hostPath": {"path": "/"}}]), "is a hostPath"),
        (policies.baseline, _set(_CONTEXT, "sysctls", value=[{"name": "kernel.x"}]), "sysctl kernel.x"),
        (policies.baseline, _set(*_SERVER, _CONTEXT, "privileged", value=True), "privileged"),
        (policies.baseline, _set(*_SERVER, _CONTEXT, "capabilities", "add", value=["SYS_ADMIN"]), "SYS_ADMIN"),
        (policies.baseline, _set(*_SERVER, "ports", value=[{"hostPort": 1}]), "hostPort"),
        (policies.baseline, _set(*_SERVER, _CONTEXT, "seccompProfile", value={"type": "Unconfined"}), "Unconfined"),
        (policies.baseline, _set(_CONTEXT, "seLinuxOptions", value={"type": "spc_t"}), "spc_t"),
        (policies.baseline, _set(_CONTEXT, "seLinuxOptions", value={"user": "root"}), "SELinux user"),
        (policies.baseline, _set(*_SERVER, _CONTEXT, "procMount", value="Unmasked"), "procMount"),
        (policies.restricted, _set("volumes", value=[{"name": "v", "nfs": {}}]), "is a nfs"),
        (policies.restricted, _set(*_SERVER, _CONTEXT, "allowPrivilegeEscalation", value=True), "escalate"),
        (policies.restricted, _set(*_SERVER, _CONTEXT, "capabilities", "drop", value=["NET_RAW"]), "does not drop ALL"),
        (policies.restricted, _set(*_SERVER, _CONTEXT, "capabilities", "add", value=["CHOWN"]), "adds capabilities"),
        (policies.restricted, _set(_CONTEXT, "runAsNonRoot", value=False), "as root"),
        (policies.restricted, _set(_CONTEXT, "seccompProfile", value={}), "no seccomp"),
    ],
)
def test_each_rule_of_a_level_is_noticed_when_broken(level: Any, change: Callable[[Spec], None], sentence: str) -> None:
    (pod,) = rendered.render("examples/minimal")
    spec = copy.deepcopy(pod["spec"])
    assert list(level(spec)) == []
    change(spec)
    assert any(sentence in line for line in level(spec)), list(level(spec))
