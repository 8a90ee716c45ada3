"""The real helper process at its start and its end: its socket, its log, its options, and who may run it."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat_shared.messages import (
    Heartbeat,
    PrepareSocketDirectory,
)
from support.conditions import wait_until
from support.helper_process import Helper, heartbeat, helper, needs_root


@pytest.fixture
def running() -> Iterator[Helper]:
    with helper() as running:
        yield running


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_clean_end_removes_the_socket_and_is_audited(running: Helper, how: signal.Signals) -> None:
    with running.connect() as client:
        heartbeat(client)
        assert running.stop(how) == 0
        assert client.at_end()
    assert not running.socket.exists()
    assert running.audit_lines()[-1]["event"] == "stop"
    assert running.audit_lines()[-1]["arguments"] == {"ReadHeartbeat": 1}


def test_the_socket_is_the_servers_groups_and_nobody_elses(running: Helper) -> None:
    status = running.socket.stat()
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())


@needs_root
def test_the_socket_is_given_to_another_group() -> None:
    with helper("--server-gid=4321") as running:
        assert running.socket.stat().st_gid == 4321
        assert stat.S_IMODE(running.socket.stat().st_mode) == 0o660


def test_only_the_directories_that_policy_allows_are_repaired_at_the_start_each_with_a_line_before() -> None:
    """The kubelet makes them root's, 0755, for volumes; plugins_registry may be left from another installation."""
    with helper(start=False) as running:
        allowed, forbidden = (
            running.directory / "kubelet" / name / "qat.intel.com" for name in ("device-plugins", "plugins_registry")
        )
        for each in (allowed, forbidden):
            each.mkdir(parents=True)
            each.chmod(0o755)
        policy = running.directory / "policy.toml"
        policy.write_text('directories = ["device-plugins"]\n')
        running.start(f"--policy={policy}")
        assert stat.S_IMODE(allowed.stat().st_mode) == 0o770
        assert stat.S_IMODE(forbidden.stat().st_mode) == 0o755
        asked, done, start = running.audit_lines()
        assert (asked["event"], asked["operation"]) == ("asked", "PrepareSocketDirectory")
        assert (asked["arguments"], asked["reason"]) == ({"directory": "device-plugins"}, "repaired at the start")
        assert (done["event"], done["verdict"], done["asked"]) == ("done", "ok", 1)
        assert start["event"] == "start"
        assert running.stop() == 0
        policy.write_text('operations = ["ReadHeartbeat"]\n')
        allowed.chmod(0o755)
        running.start(f"--policy={policy}")
        assert stat.S_IMODE(allowed.stat().st_mode) == 0o755, "the server may not have it prepared"


def test_an_idle_helper_does_not_wake_up(running: Helper) -> None:
    with running.connect() as client:
        heartbeat(client)
        assert running.process is not None
        path = Path(f"/proc/{running.process.pid}/status")
        wait_until(lambda: "S (sleeping)" in path.read_text())

        def switches() -> list[str]:
            return [line for line in path.read_text().splitlines() if "voluntary_ctxt_switches" in line]

        def quiet() -> bool:
            """Nothing for so long. The end of the child that has just read may still wake it once."""
            before = switches()
            time.sleep(1.5)
            return switches() == before

        wait_until(quiet)


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(running: Helper) -> None:
    assert "another process is listening" in Helper.start_failure(running_copy(running), f"--socket={running.socket}")
    running.stop(signal.SIGKILL)
    assert running.socket.exists()
    running.start()
    with running.connect() as client:
        assert isinstance(heartbeat(client), Heartbeat)


def running_copy(running: Helper) -> Helper:
    """A second helper with its own files."""
    directory = running.directory / "second"
    directory.mkdir()
    return Helper(directory)


def test_two_helpers_do_not_write_one_log(running: Helper) -> None:
    second = running_copy(running)
    assert "another helper is writing" in second.start_failure(f"--audit-log={running.audit}")


def test_the_chain_goes_on_after_being_killed(running: Helper) -> None:
    with running.connect() as client:
        client.ask(PrepareSocketDirectory(id=1))
    running.stop(signal.SIGKILL)
    running.start()
    assert [line["sequence"] for line in running.audit_lines()] == [1, 2, 3, 4]
    assert [line["event"] for line in running.audit_lines()] == ["start", "asked", "done", "start"]


def test_a_socket_that_is_not_ours_any_more_is_not_removed(running: Helper) -> None:
    running.socket.unlink()
    running.socket.write_text("somebody else's")
    assert running.stop() == 0
    assert running.socket.read_text() == "somebody else's"


def test_where_it_cannot_work_it_says_so_in_one_sentence() -> None:
    with helper(start=False) as running:
        (running.directory / "file").write_text("x")
        (running.directory / "bad.toml").write_text("nonsense = 1\n")
        cases = {
            f"--socket=/tmp/{'x' * 120}": "longer than 107 bytes",
            f"--socket={running.directory / 'file'}": "is not a socket",
            f"--socket={running.directory}/no/such/h.sock": (
                f"No such file or directory; create {running.directory}/no/such: "
                "owner root, the server's group, mode 0750"
            ),
            f"--sysfs-root={running.directory}": "not a readable sysfs tree",
            f"--sysfs-root={running.directory}/nowhere": "not a readable sysfs tree",
            f"--sysfs-root={running.directory}/file": "not a readable sysfs tree",
            f"--audit-log={running.directory}/no/such/log": (
                f"cannot be opened: No such file or directory; create {running.directory}/no/such: "
                "owner root, mode 0700"
            ),
            f"--audit-log={running.directory / 'file'}": "is not an audit log",
            f"--policy={running.directory}/nowhere": "cannot be read",
            f"--policy={running.directory}/bad.toml": "nonsense",
        }
        for option, said in cases.items():
            assert said in running.start_failure(option), option
        assert not running.socket.exists()


def test_a_wrong_option_is_refused() -> None:
    with helper(start=False) as running:
        for option in (
            "--server-uid=root",
            "--server-uid=-1",
            "--server-uid=65534",
            "--server-gid=65534",
            "--server-gid=4294967295",
            "--audit-rotate=-5",
            "--no-such-option",
            "--sysfs=/sys",
        ):
            assert running.spawn(option).wait(120) == 2


def test_options_come_from_the_environment_too() -> None:
    with helper(start=False) as running:
        said = running.start_failure(env=os.environ | {"QAT_HELPER_POLICY": "/nowhere/policy.toml"})
        assert "/nowhere/policy.toml" in said
        for name in ("QAT_HELPER_POLCY", "QAT_HELPER_PORT"):
            assert f"unknown variable {name}: " in running.start_failure(env=os.environ | {name: "/x"})
        said = running.start_failure(env=os.environ | {"QAT_HELPER_REQUIRE_SANDBOX": "yes"})
        assert said == "qat-helper: QAT_HELPER_REQUIRE_SANDBOX: 'yes' is not true or false\n"


AS_USER = """
import codecs, locale, os, sys  # argparse's gettext imports locale late
from qat_helper.main import main
codecs.lookup("unicode_escape")
uid = int(sys.argv[1])
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
sys.exit(main(sys.argv[2:]))
"""


def run_as(uid: int, running: Helper, *options: str) -> int:
    """The helper as another uid, which need not be able to read this checkout: its exit status.

    A new process, because the libraries of this one (gRPC) act in each process that is forked from it.
    """
    for path in (running.directory, *running.directory.rglob("*")):
        os.chown(path, uid, uid, follow_symlinks=False)
    with running.log.open("ab") as log:
        command = [sys.executable, "-c", AS_USER, str(uid), *running.options(), *options]
        return subprocess.run(command, stderr=log, stdin=subprocess.DEVNULL, check=False).returncode


@needs_root
def test_on_the_real_sysfs_it_must_be_root() -> None:
    if not os.path.isdir("/sys/bus/pci/devices"):
        pytest.skip("this machine has no PCI bus in /sys")
    with helper(start=False) as running:
        assert run_as(1234, running, "--sysfs-root=/sys/./") == 2
        assert "run the helper as root" in running.log_text()


@needs_root
@pytest.mark.parametrize("option", ["--server-uid=0", "--server-gid=0"])
def test_on_the_real_sysfs_the_server_is_not_root(option: str) -> None:
    if not os.path.isdir("/sys/bus/pci/devices"):
        pytest.skip("this machine has no PCI bus in /sys")
    with helper(start=False) as running:
        said = running.start_failure("--sysfs-root=/sys", "--server-uid=65532", "--server-gid=65532", option)
        assert said == (
            "qat-helper: --server-uid and --server-gid: 0 is root's: give the server a uid and a group of its own\n"
        )


@needs_root
def test_on_a_simulated_tree_anybody_may_run_it() -> None:
    with helper(start=False) as running:
        assert run_as(1234, running, "--server-gid=4321") == 2, running.log_text()
        assert "run the helper in that group" in running.log_text()
        thread = threading.Thread(target=run_as, args=(1234, running, "--server-gid=1234"))
        thread.start()
        wait_until(lambda: "serving on" in running.log_text())
        with running.connect() as client:
            assert isinstance(heartbeat(client), Heartbeat)
        os.kill(running.audit_lines()[-1]["arguments"]["pid"], signal.SIGTERM)
        thread.join()
        assert running.audit_lines()[-1]["event"] == "stop"
