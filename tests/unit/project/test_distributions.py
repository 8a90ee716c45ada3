"""The four distributions: each has all its packages, and the product is whole without the simulation."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DISTRIBUTIONS = {
    "shared": "qat_shared",
    "helper": "qat_helper",
    "server": "qat_server",
    "simulation": "qat_simulation",
}
PRODUCT = ("shared", "helper", "server")
BUILD = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"


def files(folder: str) -> set[str]:
    """The Python files of a distribution on disk, relative to its folder."""
    found = (ROOT / folder / DISTRIBUTIONS[folder]).rglob("*.py")
    return {path.relative_to(ROOT / folder).as_posix() for path in found}


@pytest.fixture(scope="module")
def without_simulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from: everything installed here but the simulation."""
    folder = tmp_path_factory.mktemp("installed")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "qat_plugin_simulation" not in path.name and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    for each in PRODUCT:
        (folder / DISTRIBUTIONS[each]).symlink_to(ROOT / each / DISTRIBUTIONS[each])
    return folder


def run_without_simulation(folder: Path, code: str) -> "subprocess.CompletedProcess[str]":
    # -I -S: neither the environment's site-packages nor the present folder.
    line = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_every_folder_with_a_distribution_is_known() -> None:
    assert {path.parent.name for path in ROOT.glob("*/pyproject.toml")} == DISTRIBUTIONS.keys()


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_every_package_is_listed(folder: str) -> None:
    listed = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({path.rpartition("/")[0].replace("/", ".") for path in files(folder)})


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_the_wheel_has_every_module_and_no_other_package(folder: str, tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves files in the folder that it builds from
    source.mkdir()
    (source / "pyproject.toml").write_bytes((ROOT / folder / "pyproject.toml").read_bytes())
    (source / DISTRIBUTIONS[folder]).symlink_to(ROOT / folder / DISTRIBUTIONS[folder])
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.endswith(".py")} == files(folder)
    assert {name.partition("/")[0] for name in names} == {
        DISTRIBUTIONS[folder],
        f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info",
    }


@pytest.mark.parametrize("folder", PRODUCT)
def test_nothing_in_the_product_names_the_simulation_s_package(folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".toml", ".json")]
    assert paths
    assert [str(path) for path in paths if "qat_simulation" in path.read_text()] == []


def test_the_images_are_built_without_the_simulation() -> None:
    build = (ROOT / "deployments/images/build").read_text()
    context = re.search(r"^tar -c .* \\\n +(.+) \| \\$", build, re.MULTILINE)
    assert context
    assert {"shared", "helper", "server"} <= set(context[1].split())
    assert "simulation" not in build
    files = [*ROOT.glob("deployments/images/*/Containerfile"), *ROOT.glob("deployments/examples/*/image/Containerfile")]
    assert len(files) == 4
    for file in files:
        assert "simulation" not in file.read_text()
        assert not re.findall(r"^COPY +\.", file.read_text(), re.MULTILINE), "a COPY of the whole context"


def test_the_server_imports_without_the_simulation(without_simulation: Path) -> None:
    code = (
        "import importlib, importlib.util, pkgutil, qat_server\n"
        "assert importlib.util.find_spec('qat_simulation') is None\n"
        "modules = [each.name for each in pkgutil.walk_packages(qat_server.__path__, 'qat_server.')]\n"
        "print(len([importlib.import_module(name) for name in modules]))"
    )
    done = run_without_simulation(without_simulation, code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["demo"], "qat-plugin: demo needs the distribution qat-plugin-simulation, which is not installed here"),
        (["demo", "-keep"], "qat-plugin: demo needs the distribution qat-plugin-simulation"),
        (["config", "check", "FOLDER", "--node", "n.json"], "qat-plugin: --node needs the distribution qat-plugin-sim"),
        (["serve"], "qat-plugin: unknown command 'serve'; the commands are config, doctor, provision, status\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_without_the_simulation_a_command_says_how_to_get_it(
    arguments: list[str], start: str, without_simulation: Path, tmp_path: Path
) -> None:
    (tmp_path / "qat.conf").touch()
    line = [str(tmp_path) if each == "FOLDER" else each for each in arguments]
    done = run_without_simulation(
        without_simulation, f"from qat_server import main; sys.exit(main.run({line!r}, {{}}))"
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == 1


def test_a_starting_server_looks_for_no_entry_points() -> None:
    code = (
        "import sys\n"
        "from qat_server import main, process\n"
        "from qat_server.command_line import settings\n"
        "settings.parse()\n"
        "print([name for name in sys.modules if name.endswith('.extensions') or 'qat_simulation' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
