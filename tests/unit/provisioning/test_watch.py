"""The watch of the configuration directory: changes are detected, errors keep the last valid configuration."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qat_server.provisioning import watch
from qat_server.provisioning.watch import ConfigurationWatch
from qat_simulation.kubelet.config_map import ConfigMap
from support.conditions import until


@asynccontextmanager
async def watched(
    directory: Path, node_name: str | None = None
) -> AsyncIterator[tuple[ConfigurationWatch, list[None]]]:
    changes: list[None] = []
    it = ConfigurationWatch(directory, node_name, lambda: changes.append(None))
    running = asyncio.create_task(it.run())
    try:
        await until(lambda: changes)
        yield it, changes
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def services(it: ConfigurationWatch) -> tuple[str, ...] | None:
    return it.current.conf.services if it.current is not None else None


async def test_swaps_and_edits_are_detected(tmp_path: Path) -> None:
    config = ConfigMap(tmp_path / "config")
    async with watched(config.directory) as (it, changes):
        for number in range(20):
            word = ("dc", "sym")[number % 2]
            config.write({"qat.conf": f"ServicesEnabled={word}\n"})
            await until(lambda word=word: services(it) == (word,))  # type: ignore[misc]
        assert len(changes) == 21
        config.write({})
        await until(lambda: services(it) is None)


async def test_equal_configurations_are_no_change(tmp_path: Path) -> None:
    config = ConfigMap(tmp_path / "config")
    config.write({"qat.conf": "ServicesEnabled=sym;asym\n"})
    async with watched(config.directory) as (it, changes):
        config.write({"qat.conf": "ServicesEnabled = asym;sym\n"})
        config.write({"qat.conf": "ServicesEnabled=dc"})
        await until(lambda: services(it) == ("dc",))
        assert len(changes) == 2


async def test_a_directory_that_is_created_late_and_removed(tmp_path: Path) -> None:
    directory = tmp_path / "config"
    async with watched(directory) as (it, _):
        assert services(it) is None
        assert "cannot be read: No such file" in it.error
        directory.mkdir()
        (directory / "qat.conf").write_text("ServicesEnabled=dc")
        it.load()  # at the next resync
        assert (services(it), it.error) == (("dc",), "")
        (directory / "qat.conf").write_text("ServicesEnabled=sym")
        await until(lambda: services(it) == ("sym",))
        (directory / "qat.conf").unlink()
        await until(lambda: services(it) is None)
        directory.rmdir()
        it.load()
        assert it.error, "the directory is gone"


async def test_an_error_is_logged_once_and_the_last_valid_configuration_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ConfigMap(tmp_path / "config")
    config.write({"qat.conf": "ServicesEnabled=dc"})
    with caplog.at_level(logging.INFO, "qat_server"):
        async with watched(config.directory) as (it, _):
            config.write({"qat.conf": "ServicesEnabled=magic"})
            await until(lambda: it.error)
            it.load()
            it.load()
            assert services(it) == ("dc",)
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        "provisioning configuration cannot be used"
    ]


async def test_without_inotify_a_load_detects_changes_and_the_warning_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(24, "Too many open files", "inotify_init1")

    monkeypatch.setattr(watch, "Inotify", none_left)
    config = ConfigMap(tmp_path / "config")
    with caplog.at_level(logging.INFO, "qat_server"):
        async with watched(config.directory) as (it, _):
            config.write({"qat.conf": "ServicesEnabled=dc"})
            it.load()
            assert services(it) == ("dc",)
            it.load()
    assert len([record for record in caplog.records if "not watched" in record.message]) == 1
