"""Makes the root file system of an image that holds one Python program and nothing else: no shell, no package manager.

    assemble.py ROOT ENVIRONMENT PROGRAM IMAGE SBOM [--library SONAME...] [--without PART...]

Runs in a build stage. ROOT gets the interpreter, the standard library without what a server never uses, the virtual
ENVIRONMENT with PROGRAM as its only command, the shared libraries of all these, and SBOM (CycloneDX, of the
environment) completed by the Debian packages, and by the interpreter where it is none of them. Fails for a file that
belongs to nothing in the SBOM. The same input gives the same bytes.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from closure import close
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

_STANDARD = Path(sysconfig.get_path("stdlib"))
# Tests, other programs, and what needs a screen, a database or a compiler.
_LEFT_OUT = frozenset(
    {
        *("test", "tests", "idlelib", "tkinter", "turtledemo", "turtle.py", "pydoc_data", "lib2to3", "xmlrpc"),
        *("ensurepip", "venv", "distutils", "msilib", "sqlite3", "curses", "dbm"),
        *("__pycache__", "dist-packages", "site-packages", "sitecustomize.py", "EXTERNALLY-MANAGED"),
    }
)
_EXTENSIONS_LEFT_OUT = ("_tkinter", "readline", "_curses", "_dbm", "_gdbm", "_sqlite3", "nis", "_test", "_xx", "xx")
_USERS = "root:x:0:0:root:/:/nonexistent\nnonroot:x:65532:65532:nonroot:/:/nonexistent\n"
_GROUPS = "root:x:0:\nnonroot:x:65532:\n"


def standard_library(without: tuple[str, ...]) -> Iterator[Path]:
    """Its files. `without`: names, or beginnings of extension modules' names, to be left out as well."""
    for directory, names, files in os.walk(_STANDARD):
        names[:] = [name for name in names if name not in {*_LEFT_OUT, *without} and not name.startswith("config-")]
        for name in files:
            is_extension = name.endswith(".so")
            if name in _LEFT_OUT or (is_extension and name.startswith((*_EXTENSIONS_LEFT_OUT, *without))):
                continue
            yield Path(directory, name)


def environment(venv: Path, program: str) -> Iterator[Path]:
    """The environment's files: of its commands, only the interpreter and the program."""
    for directory, names, files in os.walk(venv):
        names[:] = [name for name in names if name not in ("__pycache__", "include")]
        in_bin = Path(directory) == venv / "bin"
        for name in files:
            if not in_bin or name in ("python", "python3", program):
                yield Path(directory, name)


def found_library(name: str) -> Path:
    """Where the loader would take a shared library from that is loaded by name only."""
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        if line.split()[:1] == [name]:
            return Path(line.split(" => ")[1])
    raise SystemExit(f"{name} is not installed")


def of_interpreter(others: list[Path], venv: Path) -> list[Path]:
    """Of files of no Debian package, those of an interpreter that is not Debian's. Exits if others have no origin."""
    recorded = {
        Path(os.path.normpath(record.parent.parent / line.partition(",")[0]))
        for record in venv.rglob("*.dist-info/RECORD")
        for line in record.read_text().splitlines()
    }
    made_by_venv = {venv / "pyvenv.cfg"}
    rest = [file for file in others if file not in recorded | made_by_venv]
    places = (f"{sys.base_prefix}/bin/", f"{sys.base_prefix}/lib/libpython", f"{_STANDARD}/")
    if unknown := [file for file in rest if not str(file).startswith(places)]:
        raise SystemExit(f"neither a Debian package nor a Python distribution has {', '.join(map(str, unknown))}")
    return rest


def complete(sbom: Path, image: str, version: str, debian: dict[str, str], with_interpreter: bool) -> bytes:
    """The SBOM with the image as its subject, the Debian packages that files came from, and the interpreter."""
    made = json.loads(sbom.read_text())
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    distribution = f"{release['ID']}-{release['VERSION_ID']}".replace('"', "")
    made["metadata"]["component"] = {"type": "container", "name": image, "version": version, "bom-ref": "image"}
    made["components"] = made.get("components", []) + [
        {
            "type": "library",
            "name": name,
            "version": each,
            "bom-ref": f"deb:{name}",
            "purl": f"pkg:deb/debian/{name}@{each.replace('+', '%2B').replace('~', '%7E')}?distro={distribution}",
        }
        for name, each in debian.items()
    ]
    if with_interpreter:
        python = platform.python_version()
        purl = f"pkg:generic/python@{python}"
        component = {"type": "library", "name": "python", "version": python, "bom-ref": "python", "purl": purl}
        made["components"].append(component)
    references = sorted(component["bom-ref"] for component in made["components"])
    made["dependencies"] = [*made.get("dependencies", []), {"ref": "image", "dependsOn": references}]
    text = json.dumps(made, indent=1, sort_keys=True)
    if problem := JsonStrictValidator(SchemaVersion.from_version(made["specVersion"])).validate_str(text):
        raise SystemExit(f"the SBOM is not valid: {problem}")
    return text.encode()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("environment", type=Path)
    parser.add_argument("program")
    parser.add_argument("image")
    parser.add_argument("version")
    parser.add_argument("sbom", type=Path)
    parser.add_argument("--library", nargs="*", default=[])
    parser.add_argument("--without", nargs="*", default=[])
    given = parser.parse_args()
    root: Path = given.root
    root.mkdir(mode=0o755)
    files = [*standard_library(tuple(given.without)), *environment(given.environment, given.program)]
    # For interpreters whose own library is in /usr/local: the loader finds it by the cache that is made of these.
    files += [Path("/etc/ld.so.conf"), *Path("/etc/ld.so.conf.d").iterdir()]
    debian, others = close(root, sorted([*files, *map(found_library, given.library)]))
    with_interpreter = bool(of_interpreter(others, given.environment))
    for name, text in (("passwd", _USERS), ("group", _GROUPS)):
        (root / "etc").mkdir(exist_ok=True)
        (root / "etc" / name).write_text(text)
    subprocess.run(["ldconfig", "-X", "-r", root], check=True)
    (root / "var/cache/ldconfig/aux-cache").unlink(missing_ok=True)
    notes = root / "usr/share/doc/qat-plugin"
    notes.mkdir(parents=True)
    (notes / "sbom.cdx.json").write_bytes(complete(given.sbom, given.image, given.version, debian, with_interpreter))
    shutil.copy("LICENSE", notes / "LICENSE")
    # Compiled once, here, and never looked at again: the image is read-only, and its files' times say nothing.
    compiled = [root / _STANDARD.relative_to("/"), root / given.environment.relative_to("/")]
    options = ["-q", "-j1", "--invalidation-mode", "unchecked-hash", "-s", root, "-p", "/"]
    subprocess.run([sys.executable, "-m", "compileall", *options, *compiled], check=True, env={"PYTHONHASHSEED": "0"})


if __name__ == "__main__":
    main()
