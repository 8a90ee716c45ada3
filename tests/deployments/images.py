"""The images, built by deployments/images/build without a registry: their bases are debootstrap's.

All is kept in build/deployments: a base for as long as its recipe is the same, an image for as long as what it is
made of is. Storage is buildah's plainest (vfs), and build steps are isolated by chroot alone: that works anywhere.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from deployments.rendered import BUILT, ROOT

_STORE: Final = BUILT / "images"
_BASE: Final = "localhost/qat-test-base"
_BASES: Final = {
    "bookworm": ("--variant=minbase", "--include=python3-venv,libseccomp2,ca-certificates"),
    "trixie": ("--variant=minbase",),
}
"""By the release of Debian, debootstrap's options."""
_RELEASES: Final = {"openssl": "trixie"}
"""Of images that need another base than bookworm's."""
_HOW: Final = ("deployments/images/build", "deployments/images/closure.py")
_PYTHON: Final = (*_HOW, "deployments/images/assemble.py", "requirements/images.txt", "seccomp", "shared")
_SOURCES: Final = {
    "helper": (*_PYTHON, "deployments/images/helper", "helper", "requirements/helper.txt"),
    "server": (*_PYTHON, "deployments/images/server", "server", "requirements/server.txt"),
    "dpdk": (*_HOW, "deployments/examples/dpdk/image"),
    "openssl": (*_HOW, "deployments/examples/openssl/image"),
}
NAMES: Final = {
    "helper": "qat-plugin-helper",
    "server": "qat-plugin-server",
    "dpdk": "qat-dpdk",
    "openssl": "qat-openssl",
}
"""Their names in the SBOM; the names to pull them by are those in the manifests."""
_REGISTRY: Final = "qat-plugin.invalid"


class Image(Struct, frozen=True):
    """An image, unpacked: `root` is its file system. `compressed` is what is pulled, in bytes; `took` in seconds."""

    name: str
    root: Path
    uid: int
    gid: int
    entrypoint: tuple[str, ...]
    environment: tuple[str, ...]
    labels: dict[str, str]
    layers: tuple[str, ...]
    compressed: int
    took: float

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.lstat().st_size for path in self.files())

    def files(self) -> Iterator[Path]:
        """All that is in it but directories."""
        for directory, _, names in os.walk(self.root):
            yield from (Path(directory, name) for name in names)


@functools.cache
def why_not() -> str:
    """Why images cannot be built here, "" if they can."""
    if os.geteuid() != 0:
        return "needs root: debootstrap and buildah's chroot isolation"
    for tool in ("buildah", "debootstrap", "unshare"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"needs a mount namespace of its own: {tried.stderr.strip()}"


@functools.cache
def image(name: str) -> Image:
    """Build an image, unless it is there. `name`: one of NAMES."""
    directory = _STORE / f"{name}-{_fingerprint(name)}"
    if not (directory / "image.json").exists():
        base(_release(name))
        began = time.monotonic()
        for old in _STORE.glob(f"{name}-*"):
            shutil.rmtree(old)
        build(name, "test", directory)
        (directory / "took").write_text(str(time.monotonic() - began))
    return described(name, directory)


def build(name: str, tag: str, directory: Path) -> None:
    """Build an image and unpack it into `directory`."""
    pip = BUILT / "pip"
    pip.mkdir(parents=True, exist_ok=True)
    options = [f"--volume={pip}:/root/.cache/pip", "--volume=/etc/ssl/certs:/etc/ssl/certs:ro"]
    environment = {
        **_environment(),
        "BASE": _base_name(_release(name)),
        "TAG": tag,
        "OPTIONS": " ".join(options),
    }
    _run([ROOT / "deployments/images/build", name], environment)
    layout, root = directory / "oci", directory / "rootfs"
    root.mkdir(parents=True)
    reference = f"{_REGISTRY}/{name}:{tag}"
    _run(["buildah", "push", "-q", reference, f"oci:{layout}:{tag}"], environment)
    _run(["buildah", "rmi", reference], environment)
    manifest = _manifest(layout)
    for layer in manifest["layers"]:
        _run(["tar", "-xzf", _blob(layout, layer["digest"]), "-C", root], environment)
    (directory / "image.json").write_bytes(_blob(layout, manifest["config"]["digest"]).read_bytes())


def base(release: str) -> None:
    """An image that build stages start from: Debian's smallest and, of bookworm, Python and libseccomp."""
    environment = _environment()
    name = _base_name(release)
    inspect = ["buildah", "inspect", "--type=image", name]
    if subprocess.run(inspect, env=environment, capture_output=True, check=False).returncode == 0:
        return
    root = _STORE / "base"
    shutil.rmtree(root, ignore_errors=True)
    # What it mounts there ends with it, however it ends: a mount that is left is in the way of every later run.
    _run(["unshare", "--mount", "debootstrap", *_BASES[release], release, root], environment)
    shutil.rmtree(root / "var/cache/apt")
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)
    containerfile = _STORE / "base.Containerfile"
    containerfile.write_text("FROM scratch\nCOPY . /\n")
    _run(["buildah", "build", "-q", "--layers=false", "-f", containerfile, "-t", name, root], environment)
    shutil.rmtree(root)


def push_base(layout: Path) -> None:
    """Write bookworm's base as an OCI layout, its layer as it is (not compressed)."""
    base("bookworm")
    name = _base_name("bookworm")
    _run(["buildah", "push", "-q", "--disable-compression", name, f"oci:{layout}:base"], _environment())


def _release(name: str) -> str:
    return _RELEASES.get(name, "bookworm")


def _base_name(release: str) -> str:
    return f"{_BASE}:{hashlib.sha256(_made_of(release)).hexdigest()[:16]}"


def _made_of(release: str) -> bytes:
    return repr((release, _BASES[release])).encode()


def _environment() -> dict[str, str]:
    _STORE.mkdir(parents=True, exist_ok=True)
    storage = _STORE / "storage.conf"
    paths = f'graphroot = "{_STORE}/storage"\nrunroot = "{_STORE}/run"\n'
    storage.write_text(f'[storage]\ndriver = "vfs"\n{paths}')
    return {
        **os.environ,
        "CONTAINERS_STORAGE_CONF": os.fspath(storage),
        "BUILDAH_ISOLATION": "chroot",
        "BUILDER": "buildah",
    }


def _run(command: list[str | Path], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def _fingerprint(name: str) -> str:
    """Of all that an image is made of."""
    found = hashlib.sha256(_made_of(_release(name)))
    for source in _SOURCES[name]:
        path = ROOT / source
        files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
        for file in files:
            if "__pycache__" not in file.parts and not any(part.endswith(".egg-info") for part in file.parts):
                found.update(f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / Path(*digest.split(":"))


def _manifest(layout: Path) -> dict[str, Any]:
    index = json.loads((layout / "index.json").read_text())
    found: dict[str, Any] = json.loads(_blob(layout, index["manifests"][0]["digest"]).read_text())
    return found


def described(name: str, directory: Path) -> Image:
    """What `build` has left in a directory."""
    manifest = _manifest(directory / "oci")
    made = json.loads((directory / "image.json").read_text())
    config = made["config"]
    uid, gid = map(int, config["User"].split(":")) if config.get("User") else (0, 0)
    layers = manifest["layers"]
    took = directory / "took"
    return Image(
        name=NAMES[name],
        root=directory / "rootfs",
        uid=uid,
        gid=gid,
        entrypoint=tuple(config.get("Entrypoint") or ()),
        environment=tuple(config.get("Env") or ()),
        labels=config.get("Labels") or {},
        layers=tuple(layer["digest"] for layer in layers),
        compressed=sum(layer["size"] for layer in layers),
        took=float(took.read_text()) if took.exists() else 0.0,
    )
