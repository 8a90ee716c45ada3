"""The manifests as kustomize renders them: what is tested is what users apply, never the source files."""

import functools
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parents[2]
DEPLOYMENTS: Final = ROOT / "deployments"
BUILT: Final = ROOT / "build" / "deployments"
KUSTOMIZE: Final = BUILT / "bin" / "kustomize"

Manifest = dict[str, Any]

INSTALLATIONS: Final = ("base", *sorted(f"overlays/{each.name}" for each in (DEPLOYMENTS / "overlays").iterdir()))
"""What installs the plugin, each by itself."""
COMPONENTS: Final = tuple(sorted(each.name for each in (DEPLOYMENTS / "components").iterdir()))
EXAMPLES: Final = tuple(
    sorted(str(each.parent.relative_to(DEPLOYMENTS)) for each in DEPLOYMENTS.glob("examples/**/kustomization.yaml"))
)


@functools.cache
def _built(directory: Path) -> str:
    done = subprocess.run([KUSTOMIZE, "build", directory], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"kustomize warns: {done.stderr}"
    return done.stdout


def render(name: str) -> list[Manifest]:
    """The manifests of a folder beneath deployments/; each call makes new ones."""
    return load(_built(DEPLOYMENTS / name))


def load(text: str) -> list[Manifest]:
    """The manifests in a YAML text."""
    return [manifest for manifest in yaml.safe_load_all(text) if manifest is not None]


def combined(directory: Path, components: tuple[str, ...], *lines: str) -> list[Manifest]:
    """The base with some components, as a user combines them in a kustomization of his own in `directory`."""
    kustomization = {  # kustomize takes no absolute paths
        "resources": [os.path.relpath(DEPLOYMENTS / "base", directory)],
        "components": [os.path.relpath(DEPLOYMENTS / "components" / name, directory) for name in components],
    }
    text = yaml.safe_dump(kustomization) + "".join(f"{line}\n" for line in lines)
    (directory / "kustomization.yaml").write_text(text)
    return load(_built(directory))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pod_spec(manifests: list[Manifest]) -> Manifest:
    """The plugin's pod."""
    (daemon_set,) = of_kind(manifests, "DaemonSet")
    spec: Manifest = daemon_set["spec"]["template"]["spec"]
    return spec


def container(spec: Manifest, name: str) -> Manifest:
    (found,) = [each for each in (*spec.get("initContainers", ()), *spec["containers"]) if each["name"] == name]
    return dict(found)
