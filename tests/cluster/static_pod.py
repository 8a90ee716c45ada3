"""The plugin's pod as a standalone kubelet takes it: the DaemonSet's template, with as little changed as can be.

A kubelet without an API server takes pods from files, and refuses any that refers to an object of that server's. So,
and for nothing else:

- the service account's name is left out (the base gives it no right and mounts no token);
- a ConfigMap's volume becomes a host directory with the same files and modes, as the kubelet would have made it.

What a DaemonSet's controller adds (node affinity, tolerations) and the scheduler looks at is not there.
"""

import itertools
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from deployments import rendered
from deployments.rendered import Manifest

NAMESPACE: Final = "qat-plugin"
NAME: Final = "qat-plugin"
_NUMBERS: Final = itertools.count()
_CONFIGS: Final = Path("/etc/qat-configs")


class File(Struct, frozen=True):
    """A file that must be on the node."""

    path: Path
    text: str
    mode: int


def static_pod(manifests: list[Manifest]) -> tuple[Manifest, list[File]]:
    """The plugin's pod of rendered manifests, and the files that stand for its ConfigMaps."""
    (daemon_set,) = rendered.of_kind(manifests, "DaemonSet")
    template = daemon_set["spec"]["template"]
    spec: dict[str, Any] = {name: value for name, value in template["spec"].items() if name != "serviceAccountName"}
    maps = {each["metadata"]["name"]: each["data"] for each in rendered.of_kind(manifests, "ConfigMap")}
    files = []
    volumes = []
    for volume in spec["volumes"]:
        source = volume.get("configMap")
        if source is None:
            volumes.append(volume)
            continue
        directory = _CONFIGS / source["name"]
        mode = source.get("defaultMode", 0o644)
        files += [File(directory / key, text, mode) for key, text in maps[source["name"]].items()]
        volumes.append({"name": volume["name"], "hostPath": {"path": str(directory), "type": "Directory"}})
    spec["volumes"] = volumes
    metadata = {"name": NAME, "namespace": NAMESPACE, **template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, files


def workload(name: str, resources: dict[str, int], command: list[str] | None = None) -> Manifest:
    """A pod that asks for QAT, as plain as can be: by default vfio_client.py, which opens what it was given until it is
    ended."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        # A static pod's uid is its manifest's hash: the number makes each a pod of its own, not one that has ended.
        "metadata": {"name": name, "namespace": "default", "annotations": {"number": str(next(_NUMBERS))}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "containers": [
                {
                    "name": "main",
                    "image": "qat-workload:test",
                    "imagePullPolicy": "Never",
                    "command": command or ["python3", "/vfio_client.py"],
                    "stdin": True,
                    "resources": {"limits": {name: str(number) for name, number in resources.items()}},
                }
            ],
        },
    }
