"""What a manifest of ours must never ask for, as functions of a pod's spec that give sentences, none when all is well.

Two sets: the Pod Security Standards' levels, written from their documentation, and our own rules, which are stricter
about the plugin's pod and name each host directory with the reason why it is needed.
"""

from collections.abc import Iterator
from typing import Any, Final

Spec = dict[str, Any]

_BASELINE_CAPABILITIES: Final = frozenset(
    {
        *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE"),
        *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
    }
)
_RESTRICTED_VOLUMES: Final = frozenset(
    {
        *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"),
        "image",
    }
)

HELPER_PATHS: Final = {
    "/sys/bus/pci": "drivers_probe and unbind are written there",
    "/sys/devices": "driver_override, sriov_numvfs and qat/* are written there",
    "/sys/kernel/debug": "heartbeats and dev_cfg are read there",
    "/var/lib/kubelet/device-plugins": "it makes the server's directory there, and connects to kubelet.sock",
    "/var/lib/kubelet/pod-resources": "it connects to the socket there",
    "/var/log/qat-plugin": "the audit log outlives the pod",
}
SERVER_PATHS: Final = {
    "/var/lib/kubelet/device-plugins/qat.intel.com": "its endpoints' sockets",
}
READ_ONLY: Final = frozenset({"/sys/kernel/debug", "/var/lib/kubelet/pod-resources"})
SERVER_ID: Final = 65532


def containers(spec: Spec) -> Iterator[Spec]:
    """All containers of a pod."""
    yield from spec.get("initContainers", ())
    yield from spec["containers"]
    yield from spec.get("ephemeralContainers", ())


def baseline(spec: Spec) -> Iterator[str]:
    """What the level "baseline" forbids."""
    yield from (f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))
    yield from (f"volume {each['name']} is a hostPath" for each in spec.get("volumes", ()) if "hostPath" in each)
    yield from (f"sysctl {each['name']}" for each in spec.get("securityContext", {}).get("sysctls", ()))
    for each in containers(spec):
        name, context = each["name"], each.get("securityContext", {})
        merged = {**spec.get("securityContext", {}), **context}
        if context.get("privileged"):
            yield f"{name} is privileged"
        if added := set(context.get("capabilities", {}).get("add", ())) - _BASELINE_CAPABILITIES:
            yield f"{name} adds capabilities: {', '.join(sorted(added))}"
        if any(port.get("hostPort") for port in each.get("ports", ())):
            yield f"{name} has a hostPort"
        for profile in ("appArmorProfile", "seccompProfile"):
            if merged.get(profile, {}).get("type") == "Unconfined":
                yield f"{name} has {profile} Unconfined"
        options = merged.get("seLinuxOptions", {})
        if options.get("type") not in (
            None,
            "container_t",
            "container_init_t",
            "container_kvm_t",
            "container_engine_t",
        ):
            yield f"{name} has SELinux type {options['type']}"
        if options.get("user") or options.get("role"):
            yield f"{name} sets SELinux user or role"
        if merged.get("procMount") not in (None, "Default"):
            yield f"{name} has procMount {merged['procMount']}"


def restricted(spec: Spec) -> Iterator[str]:
    """What the level "restricted" forbids."""
    yield from baseline(spec)
    for volume in spec.get("volumes", ()):
        if kinds := set(volume) - {"name", "hostPath"} - _RESTRICTED_VOLUMES:  # hostPath is baseline's matter
            yield f"volume {volume['name']} is a {', '.join(sorted(kinds))}"
    for each in containers(spec):
        name, context = each["name"], each.get("securityContext", {})
        merged = {**spec.get("securityContext", {}), **context}
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may escalate privileges"
        if "ALL" not in context.get("capabilities", {}).get("drop", ()):
            yield f"{name} does not drop ALL capabilities"
        if set(context.get("capabilities", {}).get("add", ())) - {"NET_BIND_SERVICE"}:
            yield f"{name} adds capabilities"
        if merged.get("runAsNonRoot") is not True or merged.get("runAsUser") == 0:
            yield f"{name} may run as root"
        if merged.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{name} has no seccomp profile"


def ours(spec: Spec) -> Iterator[str]:
    """What the plugin's own pod may not, beside "baseline" without its rules on hostPath, AppArmor and SELinux."""
    if spec.get("automountServiceAccountToken") is not False:
        yield "the service account's token is mounted"
    yield from (
        f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace") if spec.get(key)
    )
    if {each["name"] for each in containers(spec)} != {"helper", "server"}:
        yield "there are other containers than helper and server"
    for each in containers(spec):
        yield from _container(spec, each)
    yield from _mounts(spec)


def _container(spec: Spec, each: Spec) -> Iterator[str]:
    name, context = each["name"], each.get("securityContext", {})
    merged = {**spec.get("securityContext", {}), **context}
    required: dict[str, bool | int] = {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
    }
    required |= {"runAsUser": 0 if name == "helper" else SERVER_ID, "runAsGroup": SERVER_ID}
    if name != "helper":
        required["runAsNonRoot"] = True
    for key, value in required.items():
        if merged.get(key) != value:
            yield f"{name}: {key} is {merged.get(key)}, not {value}"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name}: capabilities are {context.get('capabilities')}, not dropped all and none added"
    if merged.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{name}: no seccomp profile"
    if merged.get("appArmorProfile", {}).get("type") == "Unconfined" and name != "helper":
        yield f"{name}: AppArmor Unconfined"
    for kind in ("requests", "limits"):
        if missing := {"cpu", "memory"} - set(each.get("resources", {}).get(kind, ())):
            yield f"{name}: no {kind} for {', '.join(sorted(missing))}"
    if any(port.get("hostPort") for port in each.get("ports", ())):
        yield f"{name}: a hostPort"


def sandbox(spec: Spec) -> Iterator[str]:
    """The containers that would start with an incomplete sandbox."""
    for each, variable in (("helper", "QAT_HELPER_REQUIRE_SANDBOX"), ("server", "QAT_PLUGIN_REQUIRE_SANDBOX")):
        (found,) = [container for container in containers(spec) if container["name"] == each]
        values = [entry.get("value") for entry in found.get("env", ()) if entry["name"] == variable]
        if values != ["true"]:
            yield f"{each}: does not require the sandbox ({variable} is {values})"


def _mounts(spec: Spec) -> Iterator[str]:
    hosts = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    mounted = set()
    for each in containers(spec):
        allowed = HELPER_PATHS if each["name"] == "helper" else SERVER_PATHS
        for mount in each.get("volumeMounts", ()):
            mounted.add(mount["name"])
            path = hosts.get(mount["name"])
            if path is not None and path not in allowed:
                yield f"{each['name']}: mounts the host's {path}, which has no reason"
            if path in READ_ONLY and not mount.get("readOnly"):
                yield f"{each['name']}: mounts {path} to write"
            if path is not None and path != mount["mountPath"]:
                yield f"{each['name']}: mounts {path} elsewhere, at {mount['mountPath']}"
            if mount.get("mountPropagation") not in (None, "None"):
                yield f"{each['name']}: mount propagation at {mount['mountPath']}"
            if mount["name"] == "run" and each["name"] == "server" and not mount.get("readOnly"):
                yield "server: may replace the helper's socket"
    yield from (f"volume {volume['name']} is not used" for volume in spec["volumes"] if volume["name"] not in mounted)
