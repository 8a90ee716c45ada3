"""The application: help, spellings and errors of the commands."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from qat_server import main

REFUSED = {
    "unknown command": (["serve"], "unknown command 'serve'; the commands are config, demo, doctor, provision, status"),
    "unknown flag of a command": (["demo", "-kep"], "unknown flag -kep: did you mean -keep?"),
    "too many arguments": (["demo", "now"], "unexpected argument 'now'"),
    "demo's policy": (["demo", "-policy", "random"], "--policy: unknown policy 'random'; known are balanced, packed"),
    "too many arguments of all": (["demo", "now", "then"], "unexpected argument 'now'"),
    "no value of a command's flag": (["demo", "--node"], "flag --node needs a value (FILE)"),
    "demo's node is a directory": (["demo", "--node", "/tmp"], "--node: '/tmp' is a directory; a file with"),
    "demo's node": (["demo", "--node=/nonexistent.json"], "--node: there is no file '/nonexistent.json'"),
    "status of a bad address": (["status", "-metrics-address", "x"], "--metrics-address: 'x' is not an address"),
}


@pytest.mark.parametrize(("arguments", "phrase"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_one_sentence(arguments: list[str], phrase: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments, {}) == 2

    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("qat-plugin: ")
    assert phrase in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["-help"], ["-v=3", "-h"]], ids=" ".join)
def test_help_names_every_flag_and_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments, {}) == 0

    shown = capsys.readouterr().out
    for part in ("--dpdk-driver DRIVER", "--log_backtrace_at", "--version", "QAT_PLUGIN_", "demo", "status"):
        assert part in shown


@pytest.mark.parametrize("arguments", [["demo", "-h"], ["demo", "--help"], ["-h", "demo"]], ids=" ".join)
def test_help_of_a_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments, {}) == 0
    assert "--node FILE" in capsys.readouterr().out


def test_demo_is_given_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    node = tmp_path / "node.json"
    node.touch()
    got: list[tuple[object, ...]] = []
    sequence = ModuleType("qat_simulation.demo.sequence")

    def run(*arguments: object) -> int:
        got.append(arguments)
        return 1

    sequence.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "qat_simulation.demo.sequence", sequence)
    monkeypatch.setattr("qat_simulation.demo.sequence", sequence, raising=False)

    assert main.run(["demo"], {}) == 1
    assert main.run(["demo", "-keep", "-policy", "packed", "-node", str(node)], {}) == 1
    assert got == [(None, "balanced", False), (node, "packed", True)]
