"""Log files and stderr: the destination of each line, rotation, and files that cannot be written."""

import json
import re
from pathlib import Path

import pytest

from qat_server.logs import files as log_files
from qat_server.logs import handler
from qat_server.logs.files import LogFile
from qat_server.logs.settings import LogFormat, LogSettings
from support.log_lines import log, messages, say_everything

pytestmark = pytest.mark.usefixtures("logging_as_before")


def files(directory: Path) -> dict[str, list[str]]:
    """Severity tag to messages, of the regular files in a directory."""
    return {
        path.name.split(".log.")[1].split(".")[0]: messages(path.read_text())
        for path in directory.iterdir()
        if not path.is_symlink()
    }


def test_log_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler.configure(LogSettings(to_stderr=False, directory=str(tmp_path)))
    say_everything()

    assert files(tmp_path) == {
        "INFO": ["an error", "a warning", "an info"],
        "WARNING": ["an error", "a warning"],
        "ERROR": ["an error"],
    }
    assert messages(capsys.readouterr().err) == ["an error"]  # --stderrthreshold
    names = sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink())
    assert all(re.fullmatch(r"qat-plugin\.[^.]+\..+\.log\.[A-Z]+\.\d{8}-\d{6}\.\d+", name) for name in names)
    assert (tmp_path / "qat-plugin.INFO").resolve().name in names
    assert (tmp_path / "qat-plugin.ERROR").read_text().startswith("Log file created at: ")


def test_one_output(tmp_path: Path) -> None:
    handler.configure(LogSettings(to_stderr=False, directory=str(tmp_path), one_output=True, file_headers=False))
    say_everything()

    assert files(tmp_path) == {"INFO": ["an info"], "WARNING": ["a warning"], "ERROR": ["an error"]}


DESTINATIONS: dict[str, tuple[dict[str, object], list[str]]] = {
    "threshold": ({"stderr_threshold": 1}, ["an error", "a warning"]),
    "threshold too high": ({"stderr_threshold": 3}, []),
    "also": ({"also_to_stderr": True}, ["an error", "a warning", "an info"]),
    "also, with its own threshold": (
        {"also_to_stderr": True, "also_to_stderr_threshold": 1},
        ["an error", "a warning"],
    ),
}


@pytest.mark.parametrize(("options", "on_stderr"), DESTINATIONS.values(), ids=DESTINATIONS.keys())
def test_files_and_stderr(
    options: dict[str, object], on_stderr: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plugin.log"
    handler.configure(LogSettings(to_stderr=False, file=str(file), **options))  # type: ignore[arg-type]
    say_everything()

    assert messages(file.read_text()) == ["an error", "a warning", "an info"]
    assert messages(capsys.readouterr().err) == on_stderr


def test_threshold_on_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    handler.configure(LogSettings(legacy_stderr_threshold=False, stderr_threshold=1))
    say_everything()

    assert messages(capsys.readouterr().err) == ["an error", "a warning"]


def test_full_log_file_is_kept_once(tmp_path: Path) -> None:
    file = tmp_path / "plugin.log"
    handler.configure(
        LogSettings(to_stderr=False, file=str(file), file_max_size=200, headers=False, file_headers=False)
    )
    for number in range(20):
        log.info("x" * 90, n=number)

    kept = (tmp_path / "plugin.log.1").read_text() + file.read_text()
    assert kept.splitlines()[-1].endswith("n=19")
    assert file.stat().st_size <= 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plugin.log", "plugin.log.1"]


def test_log_file_is_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "plugin.log"
    for _ in range(2):
        handler.configure(LogSettings(to_stderr=False, file=str(file), headers=False, file_headers=False))
        log.info("again")

    assert file.read_text() == '"again"\n"again"\n'


def test_json_files_hold_json_only(tmp_path: Path) -> None:
    file = tmp_path / "plugin.log"
    handler.configure(LogSettings(to_stderr=False, file=str(file), format=LogFormat.JSON))
    log.info("x")

    assert [json.loads(line)["msg"] for line in file.read_text().splitlines()] == ["x"]


def test_the_error_names_a_log_file_that_cannot_be_created(tmp_path: Path) -> None:
    for settings in (
        LogSettings(to_stderr=False, file=str(tmp_path / "no/file")),
        LogSettings(to_stderr=False, directory=str(tmp_path / "no")),
    ):
        with pytest.raises(OSError) as caught:
            handler.configure(settings)
        assert str(caught.value.filename).startswith(str(tmp_path / "no"))


def test_a_link_in_place_of_a_file_in_log_dir_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        LogFile(str(link), 0, b"", follow_link=False)
    LogFile(str(link), 0, b"", follow_link=True).close()
    assert target.exists()


def test_a_full_disk_sends_lines_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler.configure(LogSettings(to_stderr=False, file=str(tmp_path / "plugin.log")))
    with monkeypatch.context() as patched:

        def full(_: LogFile, line: bytes) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(log_files.LogFile, "write", full)
        log.info("one")
        log.info("two")
    log.info("three")

    err = capsys.readouterr().err
    assert err.count("the log file cannot be written") == 1
    assert messages(err) == ["one", "two"]
    assert messages((tmp_path / "plugin.log").read_text()) == ["three"]
