"""The entry point: exit statuses, one sentence for each error, and the modules that a running server loads."""

import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qat_server import main
from qat_server.command_line.settings import Settings
from qat_shared import VERSION


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Settings]:
    """Replaces the run loop; the settings of each call. Logging is not configured."""
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
    "server's flag before a command": (["-v=3", "demo"], "-v is a flag of the server: it has no meaning before 'demo'"),
    "boolean's value after a space": (["-logtostderr", "false"], "takes its value after =, as in -logtostderr=false"),
    "bad setting": (["-max-num-devices", "0"], "--max-num-devices: 0 is too small, the minimum is 1"),
    "no sysfs": (["-sysfs-root", "/proc"], "--sysfs-root: /proc: bus/pci/devices: not a readable sysfs tree"),
    "switch": (["-version=maybe"], "--version: 'maybe' is not true or false"),
    "unknown mode": (["-mode=foo"], "--mode: unknown mode 'foo'; the only one is dpdk"),
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


def test_server_does_not_load_what_only_commands_need() -> None:
    """20 MiB: typer brings pydantic along as soon as it converts a value."""
    code = (
        "import sys\n"
        "from qat_server.command_line import settings\nfrom qat_server.logs import handler\n"
        "from qat_server.observability import http_server, metrics\n"
        "handler.configure(settings.parse({'v': '1'}).logging)\n"
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
