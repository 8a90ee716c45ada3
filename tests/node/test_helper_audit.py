"""The audit log of the real helper process: rotation, kills, full and read-only disks, copies, and what reads it."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qat_shared.messages import (
    AnyReply,
    BindDriver,
    Bound,
    Done,
    DpdkDriver,
    ErrorCode,
    Failure,
    Heartbeat,
    OpenPodResources,
    PrepareSocketDirectory,
    ReadHeartbeat,
)
from support.conditions import wait_until
from support.helper_process import COMMAND, PF, VF, Client, Helper, helper
from support.sysfs_tree import address

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")


def files(running: Helper) -> list[str]:
    return [str(path) for path in sorted(running.audit.parent.glob("audit.jsonl*"))]


def audit(*arguments: str) -> tuple[int, str]:
    """`qat-helper audit ...`: its exit status and what it printed."""
    done = subprocess.run([COMMAND, "audit", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def prepare(client: Client) -> AnyReply:
    return client.ask(PrepareSocketDirectory(id=1, reason="a test"))


def heartbeat(client: Client) -> AnyReply:
    return client.ask(ReadHeartbeat(id=1, address=address(PF)))


def refused(reply: AnyReply) -> str:
    assert isinstance(reply, Failure)
    assert reply.code is ErrorCode.AUDIT
    return reply.message


def test_one_chain_over_rotations_restarts_and_kills_and_the_clients_head_is_in_it() -> None:
    with helper(start=False) as running:
        for how in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
            running.start("--audit-rotate=2")
            with running.connect() as client:
                for _ in range(15):
                    reply = prepare(client)
                    assert isinstance(reply, Done)
            running.stop(how)
        assert len(files(running)) > 8
        assert all(Path(path).stat().st_size <= 2048 for path in files(running))
        head = f"{reply.audit.sequence}:{reply.audit.hash}"
        status, said = audit("verify", "--head", head, *files(running))
        assert (status, said.count("\n")) == (0, 1), said
        assert said.startswith(f"intact: {4 * 31 + 2} lines, the head is {4 * 31 + 2}:")
        older, *others = files(running)[1:], files(running)[0]
        status, said = audit("verify", *older[1:], *others)
        assert status == 1
        assert "from its beginning, removed before it (or use --after)" in said
        status, said = audit("verify", "--head", head, *older[:-1])
        assert status == 1
        assert "the end was cut off" in said


def test_an_interrupted_operation_is_shown_as_such() -> None:
    with helper() as running:
        with running.connect() as client:
            assert isinstance(prepare(client), Done)
            client.send(OpenPodResources(id=2, wait_ms=10_000, reason="waits"))
            wait_until(lambda: running.audit_lines()[-1].get("operation") == "OpenPodResources")
            status, said = audit("show", "--verdict", "under way", str(running.audit))
            assert said.count("\n") == 2
            running.stop(signal.SIGKILL)
        running.start()
        status, said = audit("show", str(running.audit))
        assert status == 0
        rows = [re.split(r" {2,}", line) for line in said.splitlines()]
        assert rows[0] == ["line", "time", "operation", "device", "uid", "pid", "verdict", "ms", "details"]
        assert [(row[2], row[6]) for row in rows[1:]] == [
            ("(start)", "-"),
            ("PrepareSocketDirectory", "ok"),
            ("OpenPodResources", "interrupted"),
            ("(start)", "-"),
        ]
        status, said = audit("show", "--json", "--verdict", "interrupted", str(running.audit))
        (row,) = map(json.loads, said.splitlines())
        assert (row["operation"], row["verdict"], row["reason"]) == ("OpenPodResources", "interrupted", "waits")
        assert "end_sequence" not in row


@pytest.fixture
def small_disk() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="qat-", dir="/tmp"))
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=16,mode=0700", "qat-test", str(directory)]
    if subprocess.run(mounted, check=False, capture_output=True).returncode:
        directory.rmdir()
        pytest.skip("a tmpfs cannot be mounted here")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
    directory.rmdir()


@needs_root
@pytest.mark.parametrize("rotate", [0, 16])
def test_on_a_full_disk_audited_operations_are_refused_and_reads_go_on(small_disk: Path, rotate: int) -> None:
    with helper(start=False) as running:
        running.audit = small_disk / "audit.jsonl"
        running.start(f"--audit-rotate={rotate}")
        filler = small_disk / "filler"
        with running.connect() as client:
            assert isinstance(prepare(client), Done)
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(b"x" * 512):
                    pass
            while not isinstance(reply := prepare(client), Failure):
                pass  # the last page of the log has room yet
            assert str(running.audit) in refused(reply)
            assert "No space left" in refused(reply)
            for _ in range(3):
                refused(prepare(client))
                assert isinstance(heartbeat(client), Heartbeat)
            bind = client.ask(BindDriver(id=1, address=address(VF), driver=DpdkDriver.VFIO_PCI))
            refused(bind)
            assert os.readlink(running.tree.path(VF) / "driver").endswith("/4xxxvf"), "nothing was begun"
            filler.unlink()
            assert isinstance(prepare(client), Done)
            while rotate and len(files(running)) == 1:  # how many lines that takes depends on how long they are
                assert isinstance(prepare(client), Done)
        running.stop()
        assert running.log_text().count("cannot be written") == 1
        assert running.log_text().count("can be written again") == 1
        status, said = audit("verify", *files(running))
        assert status == 0, said
        assert len(files(running)) == (2 if rotate else 1)


@needs_root
def test_without_room_for_a_new_file_rotation_waits_and_no_line_is_lost(small_disk: Path) -> None:
    """The log is renamed, and there is no inode for the next one."""
    with helper(start=False) as running:
        running.audit = small_disk / "audit.jsonl"
        running.start("--audit-rotate=2")
        for number in range(16):
            with suppress(OSError):
                (small_disk / f"filler{number}").touch()
        with running.connect() as client:
            while not isinstance(reply := prepare(client), Failure):
                pass
            assert "No space left" in refused(reply)
            assert not running.audit.exists()
            assert isinstance(heartbeat(client), Heartbeat)
            (small_disk / "filler0").unlink()
            last = prepare(client)
            assert isinstance(last, Done)
        running.stop(signal.SIGKILL)
        assert audit("verify", "--head", f"{last.audit.sequence}:{last.audit.hash}", *files(running))[0] == 0
        assert len(files(running)) == 2


@needs_root
def test_on_a_log_that_became_read_only_audited_operations_are_refused_and_reads_go_on() -> None:
    with helper() as running, running.connect() as client:
        assert isinstance(prepare(client), Done)
        if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", running.audit], check=False).returncode:
            pytest.skip("no file can be made immutable here")
        try:
            reply = prepare(client)
            if isinstance(reply, Done):
                pytest.skip("this file system lets open files be written though they are immutable")
            assert "Operation not permitted" in refused(reply)
            assert isinstance(heartbeat(client), Heartbeat)
        finally:
            subprocess.run(["chattr", "-i", running.audit], check=True)
        assert isinstance(prepare(client), Done)
        running.stop()
        assert audit("verify", str(running.audit))[0] == 0


def test_a_limit_of_the_file_size_refuses_and_is_got_over() -> None:
    with helper(start=False) as running:
        process = running.start("--audit-rotate=4", "--audit-sync=line")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (3000, -1))
        with running.connect() as client:
            while not isinstance(reply := prepare(client), Failure):
                pass
            refused(reply)
            assert isinstance(heartbeat(client), Heartbeat)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (-1, -1))
            for _ in range(20):
                assert isinstance(prepare(client), Done)
        running.stop()
        status, said = audit("verify", *files(running))
        assert status == 0, said
        assert "Fragments of failed writes: 1." in said


def test_nobody_who_reads_the_copies_holds_the_helper_up() -> None:
    with helper(start=False) as running:
        process = running.start("--audit-copy=stdout", stdout=subprocess.PIPE)
        assert process.stdout is not None
        with running.connect() as client:
            for _ in range(300):
                assert isinstance(prepare(client), Done)
        log = running.audit.read_bytes()
        assert len(log) > 100_000, "more than a pipe holds"
        copies = os.read(process.stdout.fileno(), 1 << 20)
        assert len(copies) > 50_000
        assert log.startswith(copies)
        process.stdout.close()
        with running.connect() as client:
            assert isinstance(prepare(client), Done)
        assert running.stop() == 0


def test_the_policy_files_limits_hold_and_name_their_rule() -> None:
    with helper(start=False) as running:
        policy = running.directory / "policy.toml"
        policy.write_text("rates.ReadHeartbeat = { burst = 2, per_second = 0.001 }\ndrivers = ['igb_uio']\n")
        policy.chmod(0o644)
        running.start(f"--policy={policy}")
        with running.connect() as client:
            assert [type(heartbeat(client)) for _ in range(3)] == [Heartbeat, Heartbeat, Failure]
            reply = heartbeat(client)
            assert isinstance(reply, Failure)
            assert (reply.code, reply.rule) == (ErrorCode.BUSY, "rates.ReadHeartbeat")
            running.tree.bind(VF, "vfio-pci")
            reply = client.ask(BindDriver(id=1, address=address(VF), driver=DpdkDriver.VFIO_PCI))
            assert not isinstance(reply, Bound)
        lines = [
            (line["operation"], line["result"]["rule"]) for line in running.audit_lines() if line["event"] == "refused"
        ]
        assert lines == [("ReadHeartbeat", "rates.ReadHeartbeat"), ("BindDriver", "drivers")]


def test_options_that_are_none_are_refused() -> None:
    with helper(start=False) as running:
        for option in ("--audit-sync=sometimes", "--audit-copy=everywhere", "--audit-rotate=much"):
            assert running.spawn(option).wait(120) == 2
