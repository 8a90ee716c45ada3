"""Copies files, and whatever shared libraries they need, into another root: what an image without a distribution holds.

    closure.py ROOT FILE...

Runs in a build stage on Debian or Ubuntu. Each file comes to the place it has here, with the links that lead to it; its
libraries are found by the loader itself (ldd); the copyright notes of all packages that files came from come along, as
their licences ask. usr/share/doc/packages lists the packages, each with its version. Prints nothing. Fails for a file
of no package.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_LIBRARY = re.compile(r"(?:=> )?(/[^\s:]+)(?: \(0x[0-9a-f]+\))")


def libraries(file: Path) -> set[Path]:
    """The shared libraries that the loader would load for a file, its own (the interpreter) among them."""
    done = subprocess.run(["ldd", file], capture_output=True, text=True, check=False)
    if missing := re.findall(r"(\S+) => not found", done.stdout):
        raise SystemExit(f"{file} needs {', '.join(missing)}, which is not installed")
    return {Path(path) for path in _LIBRARY.findall(done.stdout)}


def is_elf(file: Path) -> bool:
    """Whether it is a program or a library."""
    with file.open("rb") as opened:
        return opened.read(4) == b"\x7fELF"


def copy(file: Path, root: Path) -> Path:
    """Copy a file to its place beneath `root`, each link on the way as a link; the file's real path."""
    current = Path("/")
    rest = list(file.parts[1:])
    links = 0
    while rest:
        step = current / rest.pop(0)
        if step.is_symlink():
            links += 1
            if links > 40:
                raise SystemExit(f"{file}: a loop of links")
            copied = root / step.relative_to("/")
            if not copied.is_symlink():
                copied.parent.mkdir(parents=True, exist_ok=True)
                copied.symlink_to(os.readlink(step))
            target = Path(os.path.normpath(step.parent / os.readlink(step)))
            current, rest = Path("/"), [*target.parts[1:], *rest]
        elif step.is_dir():
            (root / step.relative_to("/")).mkdir(exist_ok=True)
            current = step
        else:
            destination = root / step.relative_to("/")
            if not destination.exists():
                shutil.copy2(step, destination)
            current = step
    return current


def owners(files: Iterable[Path]) -> dict[Path, str]:
    """The Debian package that owns each file; files of no package are left out."""
    # dpkg knows a path as it was before /usr was merged, or after.
    asked = {path: file for file in files for path in (str(file), str(file).removeprefix("/usr"))}
    paths = sorted(asked)
    found: dict[Path, str] = {}
    for at in range(0, len(paths), 1000):
        done = subprocess.run(["dpkg", "-S", *paths[at : at + 1000]], capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            package, _, path = line.partition(": ")
            if path in asked and "," not in package and not line.startswith("diversion by "):
                found[asked[path]] = package.partition(":")[0]
    return found


def versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of installed Debian packages, sorted by name."""
    query = ["dpkg-query", "-W", "-f", "${Version}\n"]
    return {
        name: subprocess.run([*query, name], capture_output=True, text=True, check=True).stdout.split()[0]
        for name in sorted(set(names))
    }


def close(root: Path, files: Iterable[Path]) -> tuple[dict[str, str], list[Path]]:
    """Copy files and their libraries; the versions of the packages that they came from, and the files of no package."""
    real = {copy(file, root) for file in files}
    for file in sorted(real):
        if is_elf(file):
            real |= {copy(library, root) for library in libraries(file)}
    owned = owners(sorted(real))
    notes = [Path("/usr/share/doc", name, "copyright") for name in sorted(set(owned.values()))]
    # A note may be another package's: the folder of libgcc-s1 is a link to that of gcc-12-base.
    of_notes = owners(sorted({copy(note, root) for note in notes if note.exists()}))
    return versions([*owned.values(), *of_notes.values()]), sorted(real - owned.keys())


def main() -> None:
    """See the module's docstring."""
    root = Path(sys.argv[1])
    found, others = close(root, map(Path, sys.argv[2:]))
    if others:
        raise SystemExit(f"no Debian package has {', '.join(map(str, others))}")
    (root / "usr/share/doc/packages").write_text("".join(f"{name} {version}\n" for name, version in found.items()))


if __name__ == "__main__":
    main()
