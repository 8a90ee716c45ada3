"""Writes the tables of rooms into architecture.md, from the rooms' docstrings and the import contracts of make check.

python docs/rooms.py            write it
python docs/rooms.py --check    exit with status 1 if it is not current
"""

import ast
import sys
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("architecture.md")
PACKAGES = {"qat_helper": ROOT / "helper", "qat_server": ROOT / "server", "qat_simulation": ROOT / "simulation"}


def layers(package: str) -> list[list[str]]:
    """The layers of a package from top to bottom, each with its rooms and modules."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (found,) = [each["layers"] for each in contracts if each.get("containers") == [package]]
    return [layer.split(" | ") for layer in found]


def owns(package: str, name: str) -> str:
    """The first paragraph of a room's or module's docstring."""
    path = PACKAGES[package] / package / name
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    if not docstring:
        sys.exit(f"{file.relative_to(ROOT)} has no docstring that says what it owns")
    return " ".join(docstring.split("\n\n")[0].split()).rstrip(":")


def imports(package: str, graph: grimp.ImportGraph) -> dict[str, set[str]]:
    """The rooms and modules that each room or module imports now."""
    found: dict[str, set[str]] = {}
    for importer in graph.modules:
        if importer.startswith(f"{package}."):
            for imported in graph.find_modules_directly_imported_by(importer):
                if imported.startswith(f"{package}."):
                    found.setdefault(importer.split(".")[1], set()).add(imported.split(".")[1])
    return {name: others - {name} for name, others in found.items()}


def table(package: str) -> str:
    """One row for each room, from top to bottom."""
    rows = ["| room | what it owns | may import | imports |", "|---|---|---|---|"]
    ordered = layers(package)
    now = imports(package, grimp.build_graph(package, cache_dir=None))
    order = [name for layer in ordered for name in layer]
    for layer in ordered:
        for name in layer:
            slash = "/" if (PACKAGES[package] / package / name).is_dir() else ".py"
            others = ", ".join(f"`{other}`" for other in layer if other != name)
            allowed = "no other room" if layer is ordered[-1] else f"all below{f', not {others}' if others else ''}"
            used = ", ".join(f"`{each}`" for each in sorted(now.get(name, ()), key=order.index)) or "-"
            rows.append(f"| `{name}{slash}` | {owns(package, name)} | {allowed} | {used} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """The page with current tables."""
    for package in PACKAGES:
        begin, end = f"<!-- rooms of {package} -->\n", "<!-- end -->"
        if text.count(begin) != 1:
            sys.exit(f"{PAGE.name} has no place for the rooms of {package}")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{table(package)}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    text = PAGE.read_text()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(text))
    elif page(text) != text:
        sys.exit(f"the tables of rooms in {PAGE.name} is not current: run make docs")


if __name__ == "__main__":
    main()
