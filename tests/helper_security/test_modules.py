"""What runs as root: the modules that the helper imports, none of them late, and their lines of code."""

import ast
import io
import json
import sys
import tokenize
from pathlib import Path
from types import ModuleType

import pytest

import qat_helper
import qat_shared
from qat_shared.messages import (
    BindDriver,
    DpdkDriver,
    OpenPodResources,
    PrepareSocketDirectory,
    ReadHeartbeat,
    RegisterResource,
)
from support.helper_process import PF, VF, helper
from support.sysfs_tree import address

OURS = {
    "qat_helper": "audit audit.copies audit.log child console dispatch errors job listening main operations "
    "operations.binding operations.kubelet operations.node operations.provisioning operations.reading "
    "operations.registration operations.table operations.writing options passed policy policy_file rate_limit sandbox "
    "serve",
    "qat_shared": "codec confinement devices messages pci resources seccomp sysfs values",
}
"""All modules that the helper imports, by package."""
COMMANDS = (
    "commands commands.chain commands.confined commands.explain commands.files commands.run commands.show "
    "commands.verify"
)
"""Modules of the helper's distribution that the serving process never loads: the commands that only read."""
OTHERS = "_core _json_schema _typing_utils _utils _version inspect json msgpack structs toml yaml"
"""msgspec's modules; it imports all of them."""
STANDARD = """abc argparse array ast builtins codecs collections contextlib copyreg ctypes datetime decimal dis
encodings enum errno fcntl fnmatch functools genericpath gettext importlib inspect io ipaddress itertools
keyword linecache locale marshal math ntpath numbers opcode operator os pathlib platform posix posixpath
re reprlib select selectors signal site socket stat string struct sys termios textwrap time token
tokenize types typing urllib uuid warnings zipimport"""
"""Modules of the standard library and of its own parts, whose names begin with an underscore."""
LINES = 2587
"""The present number, as a limit against growth; the aim is 1,200."""

BUILD = """
import os, sys
from qat_helper import dispatch, main, serve
begins, answers = serve.Server._listen, serve.Server._send
def tell(what):
    os.write(2, f"{what}: {' '.join(sorted(sys.modules))}\\n".encode())
def serves(server):
    begins(server)
    tell("before")
def performs(node, request, perform=dispatch.perform):
    outcome = perform(node, request)
    tell("child")
    return outcome
serve.Server._listen, dispatch.perform = serves, performs
status = main.main()
tell("after")
sys.exit(status)
"""


def modules() -> list[tuple[str, set[str]]]:
    """The modules imported when the helper begins to serve, in each child, and at its end."""
    with helper(start=False) as running:
        running.command = [sys.executable, "-c", BUILD]
        running.traceable = False
        (running.directory / "sys/bus/pci/drivers/vfio-pci").mkdir()
        running.start("--require-sandbox")
        with running.connect() as client:
            for request in (
                ReadHeartbeat(id=1, address=address(PF), reason="unusual: it's | ~"),
                BindDriver(id=2, address=address(VF), driver=DpdkDriver.VFIO_PCI, reason="unusual: it's | ~"),
                BindDriver(id=3, address=address(PF), driver=DpdkDriver.VFIO_PCI),
                PrepareSocketDirectory(id=4),
                OpenPodResources(id=5),
                RegisterResource(id=6, resource="qat.intel.com/cy", endpoint="cy.sock"),
            ):
                client.ask(request)
            client.ask(b"nonsense")
        assert running.stop() == 0
        told = [line.partition(": ") for line in running.log_text().splitlines()]
    return [(what, set(names.split())) for what, _, names in told if what in ("before", "child", "after")]


def test_root_imports_what_is_listed_and_nothing_once_it_serves() -> None:
    (first, before), *later = modules()
    assert first == "before"
    assert len(later) > 4
    for what, names in later:
        assert names - before == set(), f"imported late ({what}): in the sandbox that may fail"
    ours = {f"{package}.{name}" for package, names in OURS.items() for name in names.split()} | set(OURS)
    packages = {name for name in before if name.partition(".")[0] in OURS}
    assert packages == ours
    standard = {name.partition(".")[0] for name in before} & sys.stdlib_module_names
    assert {name for name in standard if not name.startswith("_")} - set(STANDARD.split()) == set()
    rest = {name for name in before - packages if name.partition(".")[0] not in sys.stdlib_module_names}
    assert rest - {"__main__"} - editable(rest) == {"msgspec", *(f"msgspec.{name}" for name in OTHERS.split())}


def editable(names: set[str]) -> set[str]:
    """Modules that an environment adds: editable installs' finders, Debian's hook, msgspec's optional imports."""
    return {
        name
        for name in names
        if name.startswith(("__editable__", "_distutils_hack", "typing_extensions", "sitecustomize"))
    }


def test_how_much_runs_as_root(capsys: pytest.CaptureFixture[str]) -> None:
    files = {package.__name__: modules_of(package) for package in (qat_helper, qat_shared)}
    counted = {
        f"{package}.{name}".rstrip("."): lines_of_code(files[package][name])
        for package, names in OURS.items()
        for name in ("", *names.split())
    }
    total = sum(counted.values())
    commands = {name: lines_of_code(files["qat_helper"][name]) for name in COMMANDS.split()}
    expected = {"", *OURS["qat_helper"].split(), *commands}
    assert files["qat_helper"].keys() == expected, "each module of the distribution is counted"
    with capsys.disabled():
        print(f"\n{total} lines of code run as root (aim: 1200), without blanks, comments and docstrings:")
        print(json.dumps(counted))
        print(f"{sum(commands.values())} more are in the distribution, which only its other commands load: ", end="")
        print(json.dumps(commands))
    assert total <= LINES


def modules_of(package: ModuleType) -> dict[str, Path]:
    """The files of a package by dotted name within it; "" for the package itself."""
    folder = Path(package.__file__ or "").parent
    names = {file: file.relative_to(folder).with_suffix("").parts for file in folder.rglob("*.py")}
    return {".".join(part for part in parts if part != "__init__"): file for file, parts in names.items()}


def lines_of_code(path: Path) -> int:
    """The number of lines that hold code: no blanks, comments or docstrings."""
    text = path.read_text()
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - documented)
