"""The tests here run in a guest. On the host this file boots it, and passes on what its pytest reports; in the guest it
writes those reports. So `pytest tests/kernel -k name` works as everywhere, and a failure there reads as one here.

A test's guest is said by a marker: `guest("iommu")`, the default, or `guest("no-iommu")`. With `fresh=True` the test
has a guest of its own, since what it does to the kernel cannot be undone.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel.foretold import FILE, runs
from kernel.machine import Guest, GuestError, room_for, why_not

_IN_GUEST = os.environ.get("QAT_GUEST")
_HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guest(kind='iommu', fresh=False): the guest that a test runs in")
    name = "qat-guest" if _IN_GUEST else "qat-host"
    if not config.pluginmanager.has_plugin(name):
        config.pluginmanager.register(_InGuest(config, Path(_IN_GUEST)) if _IN_GUEST else _OnHost(config), name)


def _guest_of(item: pytest.Item) -> tuple[str, str]:
    """Its kind, and the test's own name when it is alone in it."""
    marker = item.get_closest_marker("guest")
    kind = (marker.args[0] if marker.args else "iommu") if marker else "iommu"
    return kind, item.nodeid if marker and marker.kwargs.get("fresh") else ""


class _OnHost:
    """Boots a guest for each kind, and stands in for running the tests.

    The guests run beside each other where there is memory for them, since each is busy with one thing at a time.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._tests: dict[tuple[str, str], list[str]] = {}
        self._guests: dict[tuple[str, str], Guest] = {}
        self._key: tuple[str, str] | None = None
        self._dead = ""
        self._why_not = why_not()
        self._lines: list[str] = []
        self._foretelling: dict[tuple[str, str], subprocess.Popen[bytes]] = {}

    @pytest.hookimpl(trylast=True)  # after -k, -m and --deselect
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        ours = [item for item in items if _HERE in item.path.parents]
        if not ours:
            return
        order = {key: number for number, key in enumerate(dict.fromkeys(sorted(map(_guest_of, ours))))}
        ours.sort(key=lambda item: order[_guest_of(item)])
        items[:] = [item for item in items if _HERE not in item.path.parents] + ours
        for item in ours:
            self._tests.setdefault(_guest_of(item), []).append(item.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if _HERE not in item.path.parents:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        if self._why_not:
            yield self._report(item, "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {self._why_not}"))
            return
        key = _guest_of(item)
        if key != self._key:
            everything = self._key is None and room_for(len(self._tests))
            self._end()
            self._key = key
            for each in self._tests if everything else [key]:
                self._begin(each)
        guest = self._guests[key]
        if self._dead:
            yield self._report(item, "failed", self._dead)
            return
        try:
            for data in guest.reports(item.nodeid, [each for each in self._guests.values() if each is not guest]):
                report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
                if report.skipped and isinstance(report.longrepr, list):  # JSON has no tuples, and pytest wants one
                    report.longrepr = tuple(report.longrepr)
                if report.when == "call":
                    self._lines += [value for name, value in report.user_properties if name == "measured"]
                yield report
        except GuestError as error:
            self._dead = f"not run: the guest had ended or hung in {item.nodeid}"
            yield self._report(item, "failed", str(error))

    def _begin(self, key: tuple[str, str]) -> None:
        """Boot this guest, unless it has been."""
        if key not in self._guests:
            self._guests[key] = Guest(key[0], self._tests[key])
            self._foretell(key)

    def _foretell(self, key: tuple[str, str]) -> None:
        """Have what the guest is to compare with made on the host, at the same time."""
        guest = self._guests[key]
        names = [
            name for test in self._tests[key] if "test_same_scenarios" in test if (name := test.partition("[")[2][:-1])
        ]
        if names := [name for name in names if runs(name)]:
            command = [sys.executable, "-m", "kernel.foretold", str(guest.directory / FILE), *names]
            environment = os.environ | {"PYTHONPATH": str(_HERE.parent)}
            log = guest.directory / f"{FILE}.log"
            with log.open("wb") as out:
                script = '"$@" || touch "$0"'
                self._foretelling[key] = subprocess.Popen(
                    ["sh", "-c", script, f"{guest.directory / FILE}.failed", *command],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )

    def _report(self, item: pytest.Item, outcome: Any, text: Any) -> pytest.TestReport:
        return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), outcome, text, "call")

    def _end(self) -> None:
        """End the guest whose tests were the last."""
        if self._key not in self._guests:
            return
        guest = self._guests.pop(self._key)
        if self._key in self._foretelling:
            self._foretelling.pop(self._key).wait()
        if self._dead:
            guest.end(0)
        seconds = getattr(guest, "boot_seconds", None)
        if seconds is not None:
            self._lines.append(f"guest ({guest.kind}) from QEMU's start to the first test: {seconds:.1f} s")
        guest.close()
        self._dead = ""

    def pytest_sessionfinish(self) -> None:
        while self._key is not None:
            self._end()
            self._key = next(iter(self._guests), None)  # one whose turn has not come: it ends now

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._lines:
            terminalreporter.section("measured in the guest")
            for line in self._lines:
                terminalreporter.write_line(line)


class _InGuest:
    """Writes each report to the directory that is shared with the host, and waits until it is there."""

    def __init__(self, config: pytest.Config, shared: Path) -> None:
        self._config = config
        self._file = (shared / "reports.jsonl").open("a")

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"started": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._write({"report": data})

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write({"finished": nodeid})
