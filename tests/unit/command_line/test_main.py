"""The command: exit statuses, one sentence for each error, what a run of the server loads."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from qat_server import main
from qat_server.command_line.settings import Settings
from qat_server.devices.inventory import Inventory
from qat_server.observability.state import State
from qat_server.observability.status import encode
from qat_server.observability.status_report import status_from
from qat_shared import VERSION

STATUS = encode(status_from(State(inventory=Inventory(pfs=(), vfs=(), cut=(), problems=()))))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Settings]:
    """Stands in for the run loop; the settings that it was given. Logging is left alone."""
    got: list[Settings] = []
    process = ModuleType("qat_server.process")

    def run(settings: Settings) -> int:
        got.append(settings)
        return 0

    process.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "qat_server.process", process)
    monkeypatch.setattr("qat_server.process", process, raising=False)
    monkeypatch.setattr("qat_server.logs.handler.configure", lambda settings: None)
    monkeypatch.setattr("os.geteuid", lambda: 65532)
    (tmp_path / "bus/pci/devices").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return got


RUNS = {
    "no flags but the root": (["-sysfs-root", "."], {}),
    "root from the environment": ([], {"QAT_PLUGIN_SYSFS_ROOT": "."}),
    "false switches": (["--help=false", "-version=0", "-sysfs-root=."], {}),
    "closed by --": (["-sysfs-root=.", "--"], {}),
}


@pytest.mark.parametrize(("arguments", "environment"), RUNS.values(), ids=RUNS.keys())
def test_server_runs_without_a_command(
    arguments: list[str], environment: dict[str, str], served: list[Settings]
) -> None:
    assert main.run(arguments, environment) == 0
    (settings,) = served
    assert settings.sysfs_root == Path()


REFUSED = {
    "unknown flag": (["-dpdk-drivr=x"], "unknown flag -dpdk-drivr: did you mean -dpdk-driver?"),
    "unknown command": (["serve"], "unknown command 'serve'; there are config, demo, doctor, provision, status"),
    "server's flag before a command": (["-v=3", "demo"], "-v is the server's: it has no meaning before 'demo'"),
    "boolean's value after a space": (["-logtostderr", "false"], "takes its value after =, as in -logtostderr=false"),
    "bad setting": (["-max-num-devices", "0"], "--max-num-devices: 0 is too small, the minimum is 1"),
    "no sysfs": (["-sysfs-root", "/proc"], "--sysfs-root: /proc: bus/pci/devices: not a readable sysfs tree"),
    "switch": (["-version=maybe"], "--version: 'maybe' is not true or false"),
    "unknown flag of a command": (["demo", "-kep"], "unknown flag -kep: did you mean -keep?"),
    "too many arguments": (["demo", "now"], "unexpected argument 'now'"),
    "demo's policy": (["demo", "-policy", "random"], "--policy: unknown policy 'random'; known are balanced, packed"),
    "too many arguments of all": (["demo", "now", "then"], "unexpected argument 'now'"),
    "no value of a command's flag": (["demo", "--node"], "flag --node needs a value (FILE)"),
    "demo's node is a directory": (["demo", "--node", "/tmp"], "--node: '/tmp' is a directory; a file with"),
    "unknown mode": (["-mode=foo"], "--mode: unknown mode 'foo'; the only one is dpdk"),
    "demo's node": (["demo", "--node=/nonexistent.json"], "--node: there is no file '/nonexistent.json'"),
    "status of a bad address": (["status", "-metrics-address", "x"], "--metrics-address: 'x' is not an address"),
}


@pytest.mark.parametrize(("arguments", "phrase"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_one_sentence(
    arguments: list[str], phrase: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 65532)
    assert main.run(arguments, {}) == 2

    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("qat-plugin: ")
    assert phrase in output.err
    assert output.err.count("\n") == 1


def test_log_file_that_cannot_be_written(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: object) -> None:
        raise OSError(13, "Permission denied", "/var/log/x.log")

    monkeypatch.setattr("qat_server.logs.handler.configure", fail)

    assert main.run(["-sysfs-root=."], {}) == 2
    assert capsys.readouterr().err == "qat-plugin: the log file /var/log/x.log cannot be written: Permission denied\n"


def test_root_is_refused_unless_it_is_meant(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert main.run(["-sysfs-root=."], {}) == 2
    assert "--allow-root" in capsys.readouterr().err
    assert served == []
    assert main.run(["-sysfs-root=.", "-allow-root"], {}) == 0
    assert len(served) == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["-version"], {}) == 0
    assert capsys.readouterr().out == f"qat-plugin {VERSION}\n"


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


@pytest.fixture
def status_server() -> Iterator[tuple[str, list[bytes]]]:
    """Its address, and a list whose last item is what it answers."""
    bodies = [STATUS]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/status" else 404)
            self.end_headers()
            self.wfile.write(bodies[-1])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
            return

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        thread.join()


def test_status(status_server: tuple[str, list[bytes]], capsys: pytest.CaptureFixture[str]) -> None:
    address, _ = status_server

    assert main.run(["status", "-metrics-address", address], {}) == 0
    assert f"qat-plugin {VERSION}: ready" in capsys.readouterr().out


def test_status_as_json(status_server: tuple[str, list[bytes]], capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main.run(["status", "-metrics-address", status_server[0], "-json"], {}) == 0
    assert json.loads(capsysbinary.readouterr().out)["version"] == VERSION


def test_status_that_is_none(status_server: tuple[str, list[bytes]], capsys: pytest.CaptureFixture[str]) -> None:
    address, bodies = status_server
    bodies.append(b"<html>")

    assert main.run(["status", "-metrics-address", address], {}) == 1
    assert "the answer is not a status of qat-plugin" in capsys.readouterr().err


def test_status_out_of_reach(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["status", "--metrics-address=127.0.0.1:1"], {}) == 1

    assert capsys.readouterr().err == (
        "qat-plugin: no status at http://127.0.0.1:1/status (Connection refused):"
        " is the server running with --metrics-address 127.0.0.1:1?\n"
    )


def test_server_does_not_load_what_only_commands_need() -> None:
    """20 MiB: typer brings pydantic along as soon as it converts a value."""
    code = (
        "import sys\n"
        "from qat_server import main\nfrom qat_server.logs import handler\n"
        "from qat_server.observability import http_server, metrics\n"
        "handler.configure(main.settings_from(['-v', '1'], {}).logging)\n"
        "print([name for name in ('typer', 'rich', 'pydantic', 'click') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_sigterm_is_handled_before_anything_is_loaded() -> None:
    """The kernel ignores it for PID 1 of a container as long as nobody handles it."""
    loading = "main.run = lambda *_: print(flush=True) or time.sleep(60)"
    code = f"import time; from qat_server import main; {loading}; main.main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(120) == 128 + signal.SIGTERM
