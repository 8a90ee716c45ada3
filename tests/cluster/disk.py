"""The guest's disk: an ext4 image with containerd's own root in it, images imported, and the kubelet.

There is no registry: a containerd of this machine's, with a root and a socket of its own, imports the images here,
where that is quick, and what it leaves becomes the disk. Images have the very names that the manifests have, so that
nothing is rewritten and nothing pulled. The disk is made anew when anything in it has changed.
"""

import contextlib
import functools
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deployments import images, rendered
from deployments.rendered import ROOT

BUILT: Final = ROOT / "build" / "cluster"
BINARIES: Final = BUILT / "bin"
_LIBRARY: Final = "docker.io/library"
_CLIENT: Final = ROOT / "tests/kernel/vfio_client.py"
_SIZE: Final = "8G"  # what it may become; the file has holes
_LIMIT: Final = 60.0
_EXAMPLES: Final = {"dpdk": "examples/dpdk/crypto-perf", "openssl": "examples/openssl"}

PAUSE: Final = "registry.k8s.io/pause:3.10"
WORKLOAD: Final = f"{_LIBRARY}/qat-workload:test"
"""Debian's smallest with Python, and vfio_client.py at /."""
BUSYBOX: Final = f"{_LIBRARY}/busybox:1.37"
"""Debian's busybox under the name that deployments/examples/minimal has."""


def why_not() -> str:
    """Why there can be no disk here, "" if there can."""
    if reason := images.why_not():
        return reason
    for tool in ("containerd", "ctr", "mke2fs", "busybox"):
        if shutil.which(tool) is None:
            return f"needs {tool}: tests/cluster/prepare installs it where apt-get is"
    if shutil.which("go") is None and not (BINARIES / "kubelet").exists():
        return "Go is needed to compile the kubelet"
    return ""


@functools.cache
def committed() -> str:
    """What docs/by-hand.md installs on a node: the commit's trees; "" where there is no repository."""
    command = ["git", "rev-parse", *(f"HEAD:{name}" for name in ("shared", "helper", "server", "docs/by-hand.md"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def disk(programs: Sequence[str] = ("kubelet",), with_images: Sequence[str] = ("helper", "server")) -> Path:
    """Make the disk, unless it is there. `programs` of tests/cluster/build are at /run/layer/bin in the guest,
    `with_images` (helper, server, dpdk, openssl) in its containerd, beside those named above; /opt/qat-plugin is as
    docs/by-hand.md installs it."""
    subprocess.run([ROOT / "tests/cluster/build", *programs, "pause"], check=True)
    names = {name: _reference(name) for name in with_images}
    parts = [f"{reference} {images.image(name).layers}" for name, reference in names.items()]
    parts += [committed(), _digest(ROOT / "tests/cluster/by_hand")]
    parts += [_digest(BINARIES / name) for name in (*programs, "pause")]
    parts += [
        _digest(Path(path)) for path in (__file__, _CLIENT, shutil.which("busybox"), shutil.which("containerd")) if path
    ]
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    kind = "-".join((*programs, *with_images))
    made = BUILT / f"disk-{kind}-{fingerprint}"
    if not made.exists():
        for old in BUILT.glob(f"disk-{kind}-*"):
            old.unlink()
        began = time.monotonic()
        _make(made, programs, names)
        print(f"==> disk with {', '.join(names.values())}: made in {time.monotonic() - began:.1f} s")
    return made


def _reference(name: str) -> str:
    """An image's name in the manifests, which begins with a registry's and so needs no completion."""
    if example := _EXAMPLES.get(name):
        (pod,) = rendered.render(example)
        return str(rendered.container(pod["spec"], "main")["image"])
    return str(rendered.container(rendered.pod_spec(rendered.render("base")), name)["image"])


@functools.cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make(made: Path, programs: Sequence[str], names: Mapping[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="disk-", dir=BUILT) as directory:
        top = Path(directory)
        layer, archives = top / "layer", top / "archives"
        (layer / "bin").mkdir(parents=True)
        archives.mkdir()
        if committed():
            installed = layer / "upper/opt/qat-plugin"
            installed.mkdir(parents=True)
            _run(ROOT / "tests/cluster/by_hand", installed)
        for program in programs:
            shutil.copy2(BINARIES / program, layer / "bin")
        for name, reference in names.items():
            _pack(images.image(name).root.parent / "oci", reference, archives / f"{name}.tar")
        _write(archives / "pause.tar", PAUSE, {"pause": BINARIES / "pause"}, ["/pause"])
        busybox = Path(shutil.which("busybox") or "")
        _write(archives / "busybox.tar", BUSYBOX, {"bin/busybox": busybox}, ["/bin/sh"], links=_applets(busybox))
        images.push_base(top / "base")
        _write(archives / "workload.tar", WORKLOAD, {"vfio_client.py": _CLIENT}, ["python3"], on=top / "base")
        with _containerd(layer / "containerd", top / "state") as address:
            for archive in sorted(archives.iterdir()):
                subprocess.run(
                    ["ctr", "-a", address, "-n", "k8s.io", "images", "import", archive], check=True, capture_output=True
                )
        image = top / "image"
        _run("truncate", "-s", _SIZE, image)
        _run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1", "-d", layer, image)
        image.rename(made)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def _containerd(root: Path, state: Path) -> Iterator[str]:
    """A containerd of our own, which runs nothing: its socket."""
    address = str(state / "socket")
    state.mkdir()
    configuration = state / "config.toml"
    text = (
        f'version = 2\nroot = "{root}"\nstate = "{state / "run"}"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
    )
    configuration.write_text(
        f'{text}[grpc]\naddress = "{address}"\n[plugins."io.containerd.internal.v1.opt"]\npath = "{state / "opt"}"\n'
    )
    with (
        (state / "log").open("wb") as log,
        subprocess.Popen(["containerd", "-c", configuration], stdout=log, stderr=log) as process,
    ):
        try:
            deadline = time.monotonic() + _LIMIT
            while subprocess.run(["ctr", "-a", address, "version"], capture_output=True, check=False).returncode != 0:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"containerd does not answer:\n{(state / 'log').read_text()[-3000:]}")
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def _applets(busybox: Path) -> dict[str, str]:
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    return {f"bin/{name}": "busybox" for name in listed if name != "busybox"}


def _pack(layout: Path, reference: str, archive: Path) -> None:
    """An OCI layout as an archive with one image, of this name."""
    index = json.loads((layout / "index.json").read_text())
    index["manifests"][0]["annotations"] = {"io.containerd.image.name": reference}
    with tarfile.open(archive, "w") as tar:
        tar.add(layout / "blobs", "blobs")
        tar.add(layout / "oci-layout", "oci-layout")
        _add(tar, "index.json", json.dumps(index).encode())


def _write(
    archive: Path,
    reference: str,
    files: Mapping[str, Path],
    command: Sequence[str],
    links: Mapping[str, str] | None = None,
    on: Path | None = None,
) -> None:
    """An image of one layer with these files and links, on that of another layout, as an archive."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name, path in files.items():
            _add(tar, name, path.read_bytes(), 0o755)
        for name, target in (links or {}).items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    blobs: list[tuple[str, bytes]] = []

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs.append((f"blobs/sha256/{digest}", data))
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    lower, below = _layers(on) if on is not None else ([], [])
    top = blob("layer.v1.tar", layer.getvalue())
    environment = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": command, "Env": environment},
        "rootfs": {"type": "layers", "diff_ids": [*below, top["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "config": blob("config.v1+json", json.dumps(config).encode()),
        "layers": [*lower, top],
    }
    described = blob("manifest.v1+json", json.dumps(manifest).encode())
    described["annotations"] = {"io.containerd.image.name": reference}
    with tarfile.open(archive, "w") as tar:
        if on is not None:
            tar.add(on / "blobs", "blobs")
        for name, data in blobs:
            _add(tar, name, data)
        _add(tar, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        _add(tar, "index.json", json.dumps({"schemaVersion": 2, "manifests": [described]}).encode())


def _layers(layout: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The layers of the image in a layout, and the digests of what is in them."""
    index = json.loads((layout / "index.json").read_text())
    manifest = _read(layout, index["manifests"][0]["digest"])
    return manifest["layers"], _read(layout, manifest["config"]["digest"])["rootfs"]["diff_ids"]


def _read(layout: Path, digest: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((layout / "blobs" / Path(*digest.split(":"))).read_text())
    return found


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    print(disk())
