"""The commands other than serving: their output and exit status."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from qat_helper.audit.log import AuditLog, Caller, Entry
from qat_helper.commands.run import run
from qat_helper.main import main

PEER = Caller(pid=812, uid=65532, gid=65532)
CAPTURE = pytest.CaptureFixture[str]
"""Captures at descriptor level: the helper's log bypasses Python's own streams."""


def day(path: Path) -> AuditLog:
    """A log with every kind of event, from 08:00 on, one line per minute."""
    times = iter(range(1_767_254_400, 1_767_340_800, 60))
    log = AuditLog(path, clock=lambda: float(next(times)))

    def asked(operation: str, **arguments: str) -> int:
        return log.append(
            Entry(event="asked", peer=PEER, operation=operation, arguments=dict(arguments), reason="serve it to pods")
        )

    def done(asked: int, operation: str, verdict: str, **result: str | int | None) -> None:
        event = {"late": "late", "denied": "refused"}.get(verdict, "done")
        log.append(
            Entry(
                event=event, operation=operation, verdict=verdict, result=dict(result), duration_ms=12.34, asked=asked
            )
        )

    log.append(Entry(event="start", arguments={"version": "0.1.0", "pid": 1, "uid": 0}))
    first = asked("BindDriver", address="0000:6b:00.1", driver="vfio-pci")
    second = asked("BindDriver", address="0000:6b:00.2", driver="vfio-pci")
    done(second, "BindDriver", "failed", code="kernel", message="vfio-pci did not take it")
    done(first, "BindDriver", "ok", driver="vfio-pci", changed=True)
    log.append(
        Entry(
            event="refused",
            peer=PEER,
            operation="ReleaseDriver",
            arguments={"address": "0000:6b:00.1"},
            verdict="denied",
            result={"code": "denied", "message": "not among the operations", "rule": "operations"},
        )
    )
    asked("ReleaseDriver", address="0000:6b:00.3")
    log.append(Entry(event="start", arguments={"version": "0.1.0", "pid": 1, "uid": 0}))
    fourth = asked("RegisterResource", resource="qat.intel.com/cy", endpoint="cy.sock")
    done(fourth, "RegisterResource", "late")
    asked("PrepareSocketDirectory", directory="device-plugins")
    return log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    day(path).close()
    return path


TABLE = """\
line     time                      operation               device        uid    pid      verdict      ms        details
1        2026-01-01T08:00:00.000Z  (start)                 -             -      -        -            -         version=0.1.0 pid=1 uid=0
2        2026-01-01T08:01:00.000Z  BindDriver              0000:6b:00.1  65532  812      ok           12.3      driver=vfio-pci | result: driver=vfio-pci changed=True | reason: "serve it to pods"
3        2026-01-01T08:02:00.000Z  BindDriver              0000:6b:00.2  65532  812      failed       12.3      driver=vfio-pci | result: "vfio-pci did not take it" | reason: "serve it to pods"
6        2026-01-01T08:05:00.000Z  ReleaseDriver           0000:6b:00.1  65532  812      denied       -         result: "not among the operations"
7        2026-01-01T08:06:00.000Z  ReleaseDriver           0000:6b:00.3  65532  812      interrupted  -         reason: "serve it to pods"
8        2026-01-01T08:07:00.000Z  (start)                 -             -      -        -            -         version=0.1.0 pid=1 uid=0
9        2026-01-01T08:08:00.000Z  RegisterResource        -             65532  812      late         12.3      resource=qat.intel.com/cy endpoint=cy.sock | reason: "serve it to pods"
11       2026-01-01T08:10:00.000Z  PrepareSocketDirectory  -             65532  812      under way    -         directory=device-plugins | reason: "serve it to pods"
"""  # noqa: E501  a table


def test_the_table(log: Path, capfd: CAPTURE) -> None:
    assert run(["audit", "show", str(log)]) == 0
    assert capfd.readouterr().out == TABLE


def test_a_line_of_another_version_is_reported(log: Path, capfd: CAPTURE) -> None:
    with log.open("ab") as file:
        file.write(b'{"sequence":12,"event":"asked","operation":7,"previous":""}\n')
    assert run(["audit", "show", str(log)]) == 0
    assert "1 lines are not shown" in capfd.readouterr().err


FILTERS = {
    "device": (["--device", "0000:6b:00.1"], [2, 6]),
    "two devices": (["--device", "0000:6b:00.1", "--device", "0000:6b:00.3"], [2, 6, 7]),
    "operation": (["--operation", "BindDriver"], [2, 3]),
    "starts": (["--operation", "start"], [1, 8]),
    "verdict": (["--verdict", "ok", "--verdict", "interrupted"], [2, 7]),
    "since": (["--since", "2026-01-01T08:07"], [8, 9, 11]),
    "until": (["--until", "2026-01-01T08:02"], [1, 2]),
    "between": (["--since", "2026-01-01T08:01", "--until", "2026-01-01T09:03+01:00"], [2, 3]),
    "a day": (["--since", "2026-01-02"], []),
    "all of them": (["--device", "0000:6b:00.1", "--verdict", "denied", "--since", "2026-01-01"], [6]),
}


@pytest.mark.parametrize(("options", "lines"), FILTERS.values(), ids=FILTERS)
def test_filters(log: Path, capfd: CAPTURE, options: list[str], lines: list[int]) -> None:
    assert run(["audit", "show", *options, str(log)]) == 0
    assert [int(row.split()[0]) for row in capfd.readouterr().out.splitlines()[1:]] == lines
    assert run(["audit", "show", "--json", *options, str(log)]) == 0
    assert [json.loads(row)["sequence"] for row in capfd.readouterr().out.splitlines()] == lines


def test_json_has_both_ends_of_an_operation(log: Path, capfd: CAPTURE) -> None:
    run(["audit", "show", "--json", "--verdict", "ok", str(log)])
    assert json.loads(capfd.readouterr().out) == {
        "sequence": 2,
        "end_sequence": 5,
        "time": "2026-01-01T08:01:00.000Z",
        "event": "asked",
        "operation": "BindDriver",
        "device": "0000:6b:00.1",
        "peer": {"pid": 812, "uid": 65532, "gid": 65532},
        "verdict": "ok",
        "duration_ms": 12.34,
        "arguments": {"address": "0000:6b:00.1", "driver": "vfio-pci"},
        "reason": "serve it to pods",
        "result": {"driver": "vfio-pci", "changed": True},
    }


def test_the_table_of_an_edited_log_warns_and_holds_no_control_characters(log: Path, capfd: CAPTURE) -> None:
    log.write_bytes(log.read_bytes().replace(b"serve it to pods", b"\\u001b[2J\\u202e", 1))
    assert run(["audit", "show", str(log)]) == 0
    shown = capfd.readouterr()
    assert "\x1b" not in shown.out
    assert "\u202e" not in shown.out
    assert "not intact (1 fault)" in shown.err


def test_verify_an_intact_log(log: Path, capfd: CAPTURE) -> None:
    assert run(["audit", "verify", str(log)]) == 0
    intact, note = capfd.readouterr().out.splitlines()
    assert intact.startswith("intact: 11 lines, the head is 11:")
    assert note.startswith("Without --head,")
    assert run(["audit", "verify", "--head", intact.split()[-1], str(log)]) == 0
    assert capfd.readouterr().out.splitlines() == [intact]


def test_verify_names_each_fault_with_file_and_line(log: Path, capfd: CAPTURE) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], *lines[3:7], lines[7].replace(b"0.1.0", b"0.2.0"), *lines[8:]]))
    assert run(["audit", "verify", str(log)]) == 1
    assert capfd.readouterr().out.splitlines() == [
        f"{log}:3: line 3 of the chain removed before it",
        f"{log}:8: does not hold the hash of {log}:7: that line was changed",
        "NOT INTACT: 2 faults in 10 lines.",
    ]


def test_the_default_is_the_helpers_own_log_and_its_rotated_files(
    tmp_path: Path, capfd: CAPTURE, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    monkeypatch.setattr("qat_helper.commands.run.DEFAULT_LOG", path)
    with closing(AuditLog(path, limit=500)) as log:
        for _ in range(10):
            log.append(Entry(event="asked", operation="BindDriver"))
    (tmp_path / "audit.jsonl.1.gz").write_bytes(b"\x1f\x8b")
    assert run(["audit", "verify"]) == 0
    assert capfd.readouterr().out.startswith("intact: 10 lines")
    path.unlink()
    assert run(["audit", "verify"]) == 2
    assert f"{path} cannot be read: No such file" in capfd.readouterr().err


@pytest.mark.parametrize("head", ["", "12", "12:abc", "-1:" + "0" * 64, "1:" + "A" * 64, "1:" + "0" * 64 + "\n"])
def test_invalid_heads(log: Path, head: str, capfd: CAPTURE) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(["audit", "verify", f"--head={head}", str(log)])
    assert "a head is a line's number, a colon" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["audit"], ["policy"], ["audit", "erase"], ["audit", "show", "--since", "today"]]
)
def test_invalid_commands(arguments: list[str], capfd: CAPTURE) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: qat-helper" in capfd.readouterr().err


POLICY = """
operations = ["BindDriver", "ReadHeartbeat", "PrepareSocketDirectory"]
addresses = ["0000:6b:00.2", "0000:6b:00.1"]
device_ids = ["8086:4940", "8086:4941"]
drivers = ["vfio-pci"]
directories = ["device-plugins"]
max_vfs = 8
rates.BindDriver = { burst = 64, per_second = 0.5 }
rates.all = { burst = 100, per_second = 2 }
"""

# The denied operations are all others of the table.
EXPLAINED = (
    "Allowed operations:",
    "  BindDriver: Bind a VF of the device table to a DPDK driver; unbind it from its kernel VF driver if needed. "
    "At most 64 at once, then 0.5 a second.",
    "  ReadHeartbeat: Query the heartbeat of a PF's firmware.",
    "  PrepareSocketDirectory: Create qat.intel.com in a directory of the kubelet, writable by the server's group.",
    "  All audited operations together: at most 100 at once, then 2 a second.",
    "Denied operations (rule operations):",
    "  OpenPodResources: the server does not see which pods hold devices",
    "  ReadDeviceConfig: VFs whose PF has no services in sysfs are served as generic",
    "  RegisterResource: the server cannot register, unless it uses the kubelet's plugin watcher",
    "  ReleaseDriver",
    "Allowed devices:",
    "  only these addresses: 0000:6b:00.1, 0000:6b:00.2 (rule addresses)",
    "  only these device ids: 8086:4940 (a PF), 8086:4941 (rule device_ids)",
    "Drivers that a VF may be bound to: vfio-pci (rule drivers).",
    "Kubelet directories in which the server may serve: device-plugins (rule directories).",
    "VFs that one PF may have: at most 8; QAT drivers enable all VFs of a PF, so a PF with more gets none "
    "(rule max_vfs).",
)


def policy(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    path.chmod(0o644)
    return path


def test_a_policy_in_plain_words(tmp_path: Path, capfd: CAPTURE) -> None:
    path = policy(tmp_path, POLICY)
    assert main(["policy", "check", str(path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"{path} is valid."
    if os.geteuid() != 0:
        assert lines.pop(1).startswith("But it belongs to uid")
    assert [line for line in lines[1:] if line in EXPLAINED] == list(EXPLAINED)
    assert all(line.startswith("  ") for line in lines[1:] if line not in EXPLAINED), "the other denied operations"


def test_an_empty_policy_in_plain_words(tmp_path: Path, capfd: CAPTURE) -> None:
    assert main(["policy", "check", str(policy(tmp_path, ""))]) == 0
    shown = capfd.readouterr().out
    for line in (
        "  any address",
        "  any QAT device id",
        "Drivers that a VF may be bound to: igb_uio, vfio-pci.",
        "VFs that one PF may have: no limit.",
        "  All audited operations together: at most 2400 at once, then 0.5 a second.",
    ):
        assert f"{line}\n" in shown
    assert "denied" not in shown


def test_a_policy_that_allows_nothing(tmp_path: Path, capfd: CAPTURE) -> None:
    text = "operations = []\naddresses = []\ndevice_ids = []\ndrivers = []\ndirectories = []\nmax_vfs = 0\n"
    assert main(["policy", "check", str(policy(tmp_path, text))]) == 0
    shown = capfd.readouterr().out
    for part in ("  nothing\n", "only these addresses: none", "only these device ids: none", "bound to: none (rule"):
        assert part in shown


def test_a_policy_that_cannot_be_used(tmp_path: Path, capfd: CAPTURE) -> None:
    path = policy(tmp_path, "operations = ['Reboot']")
    assert main(["policy", "check", str(path)]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"qat-helper: {path} line 1: operations: unknown value 'Reboot'; known are BindDr")
    assert shown.err.count("\n") == 1


def test_the_serving_helper_loads_none_of_this() -> None:
    code = "import sys, qat_helper.main; print(*(name for name in sys.modules if name.startswith('qat_helper')))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "qat_helper.audit.log" in loaded
    assert not [name for name in loaded if name.startswith("qat_helper.commands")]


def test_a_reader_that_stops_is_not_an_error(log: Path) -> None:
    command = [sys.executable, "-c", "import sys; from qat_helper.main import main; sys.exit(main())", "audit", "show"]
    process = subprocess.Popen([*command, str(log)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (2, b"")
