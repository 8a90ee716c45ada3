"""Every kustomization is built, is valid for a range of Kubernetes versions, and says what the programs understand."""

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deployments import rendered
from deployments.overlays import setup_of
from deployments.rendered import BUILT, COMPONENTS, DEPLOYMENTS, EXAMPLES, INSTALLATIONS, Manifest
from qat_helper.options import parse as helper_options
from qat_server.command_line import flags, settings
from qat_server.composition import Server
from qat_server.observability import metrics
from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL

pytestmark = pytest.mark.usefixtures("kustomize")

VERSIONS: Final = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
"""From the first with appArmorProfile (and native sidecars on by default) to the newest whose schemas are there."""
_CUSTOM: Final = frozenset({"PodMonitor", "NodeFeatureRule", "SecurityContextConstraints"})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", (*INSTALLATIONS, *EXAMPLES))
def test_each_is_valid(name: str, version: str) -> None:
    manifests = rendered.render(name)
    assert manifests
    for manifest in manifests:
        if manifest["kind"] not in _CUSTOM:
            assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_the_validator_finds_what_is_wrong() -> None:
    spec = rendered.pod_spec(manifests := rendered.render("base"))
    spec["initContainers"][0]["restartPolicy"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(rendered.of_kind(manifests, "DaemonSet")[0], VERSIONS[0], strict=True)
    spec = rendered.pod_spec(manifests := rendered.render("base"))
    spec["contaners"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(rendered.of_kind(manifests, "DaemonSet")[0], VERSIONS[0], strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):  # the range begins where it must
        kubernetes_validate.validate(rendered.of_kind(rendered.render("base"), "DaemonSet")[0], "1.29", strict=True)


def test_all_components_together_and_in_another_namespace(tmp_path: Path) -> None:
    manifests = rendered.combined(tmp_path, COMPONENTS, "namespace: inteldeviceplugins-system")
    for manifest in manifests:
        place = manifest["metadata"].get("namespace")
        if manifest["kind"] == "Namespace":
            assert manifest["metadata"]["name"] == "inteldeviceplugins-system"
        elif manifest["kind"] not in ("SecurityContextConstraints", "NodeFeatureRule"):
            assert place == "inteldeviceplugins-system"
        if manifest["kind"] not in _CUSTOM:
            kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
    (binding,) = rendered.of_kind(manifests, "RoleBinding")
    assert binding["subjects"][0]["namespace"] == "inteldeviceplugins-system"


@pytest.mark.parametrize("pair", list(itertools.combinations(COMPONENTS, 2)), ids="+".join)
def test_components_combine_in_either_order(pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = rendered.combined(tmp_path / "a", pair), rendered.combined(tmp_path / "b", pair[::-1])

    def normal(manifests: list[Manifest]) -> list[str]:
        return sorted(json.dumps(_with_sorted_lists(manifest), sort_keys=True) for manifest in manifests)

    assert normal(one) == normal(other)


def _with_sorted_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_sorted_lists(each) for key, each in value.items()}
    if isinstance(value, list):
        return sorted((_with_sorted_lists(each) for each in value), key=lambda each: json.dumps(each, sort_keys=True))
    return value


def _arguments() -> Iterator[tuple[str, str, list[str]]]:
    for name in INSTALLATIONS:
        spec = rendered.pod_spec(rendered.render(name))
        for which in ("helper", "server"):
            yield name, which, rendered.container(spec, which).get("args", [])


def test_the_programs_understand_their_arguments() -> None:
    for name, which, arguments in _arguments():
        if which == "helper":
            helper_options(arguments)  # ends the process for what it does not know
        else:
            line = flags.read(arguments, flags.SERVER_FLAGS)
            assert not line.rest, name
            settings.parse(line.values)


def test_ports_and_probes_agree_with_the_address_that_is_served() -> None:
    for name in INSTALLATIONS:
        server = rendered.container(rendered.pod_spec(rendered.render(name)), "server")
        served = settings.parse(flags.read(server["args"], flags.SERVER_FLAGS).values).metrics_address
        assert served is not None
        assert not served.host  # all of the pod's: loopback could not be probed
        assert [(port["name"], port["containerPort"]) for port in server["ports"]] == [("metrics", served.port)]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = "/readyz" if probe == "readinessProbe" else "/healthz"
            assert server[probe]["httpGet"] == {"path": path, "port": "metrics"}


def test_paths_agree_with_the_programs_defaults() -> None:
    defaults = settings.parse()
    helper = helper_options([])
    spec = rendered.pod_spec(rendered.render("base"))
    mounts = {
        which: {mount["mountPath"] for mount in rendered.container(spec, which)["volumeMounts"]}
        for which in ("helper", "server")
    }
    assert str(defaults.socket_directory) in mounts["server"]
    assert str(defaults.socket_directory.parent) in mounts["helper"]
    assert {str(helper.socket.parent), str(helper.audit_log.parent)} <= mounts["helper"]
    assert helper.socket == defaults.helper_socket
    assert str(defaults.helper_socket.parent) in mounts["server"]
    assert {helper.server_uid, helper.server_gid} == {
        rendered.container(spec, "server")["securityContext"]["runAsUser"]
    }


def test_the_paths_and_the_policy_of_hardened_agree() -> None:
    spec = rendered.pod_spec(rendered.render("overlays/hardened"))
    server = rendered.container(spec, "server")
    chosen = settings.parse(flags.read(server["args"], flags.SERVER_FLAGS).values)
    assert str(chosen.socket_directory) in {mount["mountPath"] for mount in server["volumeMounts"]}
    assert chosen.registration.socket_directory.value in str(setup_of(rendered.render("overlays/hardened")).policy)


@pytest.mark.parametrize("which", ["helper", "server"])
def test_the_profiles_that_hardened_names_are_ours(which: str) -> None:
    context = rendered.container(rendered.pod_spec(rendered.render("overlays/hardened")), which)["securityContext"]
    apparmor = context["appArmorProfile"]["localhostProfile"]
    seccomp = Path(context["seccompProfile"]["localhostProfile"])
    files = (rendered.ROOT / "apparmor" / apparmor, rendered.ROOT / "seccomp" / seccomp.name)
    readme = (DEPLOYMENTS / "README.md").read_text()
    for file in files:
        assert str(file.relative_to(rendered.ROOT)) in readme  # how it comes to the node
    assert re.search(rf"^profile {apparmor}\b", files[0].read_text(), re.MULTILINE)
    assert json.loads(files[1].read_text())["defaultAction"] == "SCMP_ACT_ERRNO"


def test_the_hardware_label_is_what_nfd_sets() -> None:
    manifests = rendered.render("overlays/nfd")
    (rule,) = rendered.of_kind(manifests, "NodeFeatureRule")[0]["spec"]["rules"]
    (label,) = rule["labels"].items()
    assert label in rendered.pod_spec(manifests)["nodeSelector"].items()
    (feature,) = rule["matchFeatures"]
    assert feature["feature"] == "pci.device"
    assert feature["matchExpressions"]["vendor"] == {"op": "In", "value": [f"{VENDOR_INTEL:04x}"]}
    ids = [int(number, 16) for number in feature["matchExpressions"]["device"]["value"]]
    assert ids == [*PHYSICAL, *VIRTUAL]


def _expressions(dashboard: Any) -> Iterator[str]:
    if isinstance(dashboard, dict):
        for key, value in dashboard.items():
            if key == "expr":
                yield value
            yield from _expressions(value)
    elif isinstance(dashboard, list):
        for value in dashboard:
            yield from _expressions(value)


def test_the_dashboard_shows_all_metrics_that_the_server_has_and_no_others() -> None:
    configs = rendered.of_kind(rendered.render("overlays/monitoring"), "ConfigMap")
    (config,) = [each for each in configs if each["metadata"].get("labels", {}).get("grafana_dashboard") == "1"]
    ((_, text),) = config["data"].items()
    expressions = "\n".join(_expressions(json.loads(text)))
    shown, there = set(re.findall(r"\b(?:qat_plugin|process)_\w+", expressions)), _exported()
    assert shown <= there
    ours = {name for name in there if name.startswith("qat_plugin_") and not name.endswith(("_sum", "_count"))}
    assert ours <= shown, "what the server tells, the dashboard shows"


def _exported() -> set[str]:
    """The names that the server's /metrics has: its families are there before anything has happened."""
    server = Server(settings.parse())
    text = metrics.text(metrics.registry(server.state, server.counters)).decode()
    names = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        names |= {f"{name}{suffix}" for suffix in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    return names


def test_the_pod_monitor_is_one_to_its_operator_and_selects_the_pods() -> None:
    manifests = rendered.render("overlays/monitoring")
    (monitor,) = rendered.of_kind(manifests, "PodMonitor")
    definition = yaml.safe_load((BUILT / "podmonitors.yaml").read_text())
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    assert monitor["apiVersion"] == f"{definition['spec']['group']}/v1"
    schema = _closed(version["schema"]["openAPIV3Schema"])
    jsonschema.validate(monitor, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**monitor, "spec": {**monitor["spec"], "intervall": "1s"}}, schema)
    (daemon_set,) = rendered.of_kind(manifests, "DaemonSet")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= daemon_set["spec"]["template"]["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (port,) = rendered.container(rendered.pod_spec(manifests), "server")["ports"]
    assert endpoint["port"] == port["name"]
    (policy,) = rendered.of_kind(manifests, "NetworkPolicy")
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port["name"]}]
    assert "ingress" not in rendered.of_kind(rendered.render("base"), "NetworkPolicy")[0]["spec"]


def _closed(schema: Any) -> Any:
    """The schema, with no properties allowed but those that it names, as the API server prunes the others."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items()}
    if (
        schema.get("type") == "object"
        and isinstance(schema.get("properties"), dict)
        and "metadata" not in schema["properties"]
    ):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_asks_for_qat_in_a_container_that_can_use_it(name: str) -> None:
    for manifest in rendered.render(name):
        spec = manifest["spec"]
        for each in spec["containers"]:
            asked = {
                key: value for key, value in each["resources"]["limits"].items() if key.startswith("qat.intel.com/")
            }
            assert len(asked) == 1  # two resources have a QAT0 each, and one would hide the other
            if any("hugepages" in key for key in each["resources"]["limits"]):
                assert float(each["resources"]["limits"]["cpu"]).is_integer()
                assert each["resources"].get("requests", each["resources"]["limits"]) == each["resources"]["limits"]


@pytest.mark.parametrize("name", (*INSTALLATIONS, *EXAMPLES))
def test_no_registry_can_have_an_image_that_is_not_pulled_from_a_registry_of_the_users(name: str) -> None:
    """A name without a registry would be completed to docker.io's, where anybody may have taken it."""
    specs = [
        manifest["spec"] if manifest["kind"] == "Pod" else manifest["spec"]["template"]["spec"]
        for manifest in rendered.render(name)
        if manifest["kind"] in ("Pod", "DaemonSet", "Deployment", "Job")
    ]
    assert specs
    names = {
        container["image"] for spec in specs for container in (*spec.get("initContainers", ()), *spec["containers"])
    }
    assert names
    for image in names - {"busybox:1.37"}:  # Docker's official image, in examples/minimal
        registry, _, rest = image.partition("/")
        assert registry.endswith(".invalid"), image  # RFC 2606
        assert re.fullmatch(r"[a-z]+:[0-9.]+", rest), image


def test_the_readmes_name_everything_that_is_there_and_nothing_that_is_not() -> None:
    text, examples = ((DEPLOYMENTS / folder / "README.md").read_text() for folder in ("", "examples"))
    for name in (*INSTALLATIONS, *COMPONENTS):
        assert f"`{name}`" in text, name
    for name in EXAMPLES:
        assert f"`{name.removeprefix('examples/')}`" in examples, name
    for line in re.findall(r"^kubectl .*$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        for option, value in itertools.pairwise(words):
            if option == "-k":
                assert (rendered.ROOT / value / "kustomization.yaml").exists(), line
