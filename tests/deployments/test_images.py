"""The images: what is in them, what is not, and that the same sources give the same image."""

import functools
import json
import os
import re
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Final

import pytest

from deployments import images, measured
from deployments.images import Image
from deployments.rendered import BUILT, ROOT
from qat_shared import VERSION

pytestmark = pytest.mark.skipif(bool(images.why_not()), reason=images.why_not())

_USERS: Final = {"helper": (0, 65532), "server": (65532, 65532)}
_PROGRAMS: Final = {"helper": "qat-helper", "server": "qat-plugin"}
_NOT_OURS: Final = (
    "*/bin/*sh",
    "*/bin/busybox",
    "*/bin/pip*",
    "*/bin/apt*",
    "*/bin/dpkg*",
    "*/ensurepip/*",
    "*/setuptools/*",
    "*/pip/*",
)


@pytest.fixture(params=_USERS)
def image(request: pytest.FixtureRequest) -> Image:
    return images.image(request.param)


def _of(image: Image) -> str:
    return image.name.removeprefix("qat-plugin-")


def test_it_says_what_it_is(image: Image) -> None:
    name = _of(image)
    assert (image.uid, image.gid) == _USERS[name]
    assert image.entrypoint == (f"/opt/qat-plugin/{name}/bin/{_PROGRAMS[name]}",)
    label = "org.opencontainers.image."
    assert image.labels[f"{label}version"] == VERSION
    assert image.labels[f"{label}licenses"] == "Apache-2.0"
    assert len(image.labels[f"{label}revision"]) in (40, len("unknown"))
    assert {f"{label}title", f"{label}description"} <= set(image.labels)
    measured.note(
        f"{image.name}: {image.compressed / 1e6:.1f} MB compressed, {image.size / 1e6:.1f} MB in"
        f" {sum(1 for _ in image.files())} files, built in {image.took:.0f} s"
    )


def test_there_is_nothing_but_the_program_in_it(image: Image) -> None:
    for path in image.files():
        inside = Path("/", path.relative_to(image.root))
        status = path.lstat()
        assert not stat.S_IMODE(status.st_mode) & (stat.S_ISUID | stat.S_ISGID), inside
        assert (status.st_uid, status.st_gid) == (0, 0), inside
        if not stat.S_ISLNK(status.st_mode):
            assert not stat.S_IMODE(status.st_mode) & 0o022, inside
        assert not any(inside.match(pattern) for pattern in _NOT_OURS), inside
    programs = {
        path.name
        for folder in ("usr/bin", "usr/sbin", "bin", f"opt/qat-plugin/{_of(image)}/bin")
        for path in (image.root / folder).glob("*")
    }
    assert {name for name in programs if not name.startswith("python")} == {_PROGRAMS[_of(image)]}
    sizes: dict[str, int] = {}
    for path in image.files():
        inside = path.relative_to(image.root)
        key = "/".join(inside.parts[:7] if "site-packages" in inside.parts else inside.parts[:3])
        sizes[key] = sizes.get(key, 0) + path.lstat().st_size
    for key, size in sorted(sizes.items(), key=lambda item: -item[1])[:8]:
        measured.note(f"  {_of(image)}: {size / 1e6:6.1f} MB  /{key}")


def test_what_runs_as_root_is_msgspec_and_ours_alone() -> None:
    installed = {component["name"] for component in _python_components(images.image("helper"))}
    assert installed == {"msgspec", "qat-plugin-helper", "qat-plugin-shared"}
    assert not list(images.image("helper").root.rglob("libcrypto*"))


def test_what_is_locked_is_what_is_installed(image: Image) -> None:
    lines = (ROOT / f"requirements/{_of(image)}.txt").read_text().splitlines()
    locked = {
        (_normal(name), version) for name, version in (line.split(" ")[0].split("==") for line in lines if "==" in line)
    }
    installed = {(_normal(each["name"]), each["version"]) for each in _python_components(image)}
    ours = {name for name, _ in installed if name.startswith("qat-plugin")}
    assert {pair for pair in installed if pair[0] not in ours} <= locked
    # What markers leave out on this platform is the only difference.
    assert {name for name, _ in locked} - {name for name, _ in installed} <= {"colorama", "pywin32-ctypes"}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_list_of_its_parts_names_the_packages_that_its_files_are_from(image: Image) -> None:
    sbom = json.loads((image.root / "usr/share/doc/qat-plugin/sbom.cdx.json").read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    assert sbom["metadata"]["component"]["name"] == image.name
    debian = {each["name"] for each in sbom["components"] if each["bom-ref"].startswith("deb:")}
    assert {"libc6", "libseccomp2"} <= debian
    for name in debian:
        assert (image.root / "usr/share/doc" / name / "copyright").exists() or name.startswith("lib"), name


def test_each_file_belongs_to_what_the_sbom_lists_in_the_version_that_it_lists(image: Image) -> None:
    owners, versions = _debian_of_the_base()
    sbom = json.loads((image.root / "usr/share/doc/qat-plugin/sbom.cdx.json").read_text())
    listed = {each["name"]: each["version"] for each in sbom["components"] if each["bom-ref"].startswith("deb:")}
    ours = {(_normal(each["name"]), each["version"]) for each in _python_components(image)}
    distributions = _recorded(image)
    used, unknown = set(), []
    for path in image.files():
        inside = Path("/", path.relative_to(image.root))
        if path.is_symlink() or inside in _MADE or inside.match("/opt/qat-plugin/*/pyvenv.cfg"):
            continue
        if inside.parent.name == "__pycache__":
            inside = inside.parent.with_name(f"{inside.name.partition('.')[0]}.py")
        if package := owners.get(str(inside)) or owners.get(str(inside).removeprefix("/usr")):
            used.add(package)
        elif distributions.get(inside) not in ours:
            unknown.append(str(inside))
    assert not unknown
    assert listed == {package: versions[package] for package in used}


_MADE: Final = {
    *(Path("/etc", name) for name in ("passwd", "group", "ld.so.cache")),
    *(Path("/usr/share/doc/qat-plugin", name) for name in ("sbom.cdx.json", "LICENSE")),
}
"""Files that the build makes, or that are this project's."""


def _recorded(image: Image) -> dict[Path, tuple[str, str]]:
    """The Python distribution, by name and version, of each file that one has installed."""
    found = {}
    for record in image.root.glob("opt/qat-plugin/*/lib/python3*/site-packages/*.dist-info/RECORD"):
        name, version = record.parent.name.removesuffix(".dist-info").split("-")
        for line in record.read_text().splitlines():
            path = Path(os.path.normpath(record.parent.parent / line.partition(",")[0]))
            found[Path("/", path.relative_to(image.root))] = (_normal(name), version)
    return found


@functools.cache
def _debian_of_the_base() -> tuple[dict[str, str], dict[str, str]]:
    """What dpkg has noted in bookworm's base: the package of each path, and the version of each package."""
    owners, versions = {}, {}
    with tempfile.TemporaryDirectory(dir=BUILT) as directory:
        images.push_base(Path(directory))
        (layer,) = [blob for blob in Path(directory).glob("blobs/sha256/*") if tarfile.is_tarfile(blob)]
        with tarfile.open(layer) as tar:
            for member in tar:
                place = Path("/", member.name)
                if place == Path("/var/lib/dpkg/status"):
                    for entry in _text(tar, member).split("\n\n"):
                        fields = dict(re.findall(r"^(Package|Version): (.+)$", entry, re.MULTILINE))
                        versions[fields.get("Package", "")] = fields.get("Version", "")
                elif place.match("/var/lib/dpkg/info/*.list"):
                    package = place.stem.partition(":")[0]
                    owners.update(dict.fromkeys(_text(tar, member).splitlines(), package))
    return owners, versions


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None
    return file.read().decode()


@pytest.mark.parametrize(("example", "expected"), [("dpdk", "librte-common-qat23"), ("openssl", "qatengine")])
def test_an_example_lists_the_packages_that_its_files_are_from(example: str, expected: str) -> None:
    root = images.image(example).root
    listed = dict(line.split(" ") for line in (root / "usr/share/doc/packages").read_text().splitlines())
    assert {expected, "libc6", "dash"} <= set(listed)
    assert all(re.fullmatch(r"[0-9][A-Za-z0-9.+~:-]*", version) for version in listed.values())
    assert {note.parent.name for note in root.glob("usr/share/doc/*/copyright")} <= set(listed)


def _python_components(image: Image) -> list[dict[str, str]]:
    sbom = json.loads((image.root / "usr/share/doc/qat-plugin/sbom.cdx.json").read_text())
    return [each for each in sbom["components"] if not each["bom-ref"].startswith("deb:")]


def test_every_module_of_ours_can_be_imported_there(image: Image) -> None:
    """Nothing that is left out of the standard library is missed: neither at the start nor by a rare command."""
    program = (
        "import importlib, pkgutil\n"
        f"for top in ('qat_shared', 'qat_{_of(image)}'):\n"
        "    package = importlib.import_module(top)\n"
        "    for each in pkgutil.walk_packages(package.__path__, f'{top}.'):\n"
        "        importlib.import_module(each.name); print(each.name)\n"
        "import ctypes, hashlib; ctypes.CDLL('libseccomp.so.2'); print(hashlib.sha256(b'').hexdigest()[:8])\n"
    )
    done = subprocess.run(
        ["chroot", image.root, f"/opt/qat-plugin/{_of(image)}/bin/python3", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    assert "e3b0c442" in done.stdout
    assert f"qat_{_of(image)}.main" in done.stdout


def test_the_same_sources_give_the_same_image() -> None:
    """Of the helper: what runs as root is what anybody can build again."""
    first = images.image("helper")
    with tempfile.TemporaryDirectory(dir=BUILT) as again:
        images.build("helper", "again", Path(again))
        second = images.described("helper", Path(again))
    assert second.layers == first.layers
