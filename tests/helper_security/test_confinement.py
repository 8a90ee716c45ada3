"""The helper's sandbox, tried from inside once it serves; and what it reports about missing layers."""

import ctypes
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helper_security.forbidden import unexpected
from qat_helper import sandbox
from qat_shared import confinement
from qat_shared.messages import PROTOCOL, BindDriver, Bound, DpdkDriver, Heartbeat, Hello, ReadHeartbeat, Welcome
from qat_shared.seccomp import read_profile
from support.conditions import wait_until
from support.helper_process import PF, VF, Helper, helper, run_as_user
from support.sysfs_tree import address

HERE = Path(__file__).parent
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, or drop a capability")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory outside the helper's sandbox, with a world-writable file."""
    (tmp_path / "there").write_text("untouched\n")
    (tmp_path / "there").chmod(0o666)
    return tmp_path


@pytest.fixture
def helped() -> Iterator[Helper]:
    with helper(start=False) as running:
        running.traceable = False
        yield running


def answers(text: str) -> list[dict[str, int]]:
    """The output of the test builds; the last line may be incomplete."""
    lines = (line for line in text.splitlines(keepends=True) if line.endswith("\n"))
    return [json.loads(line.partition(" ")[2]) for line in lines if line.startswith("forbidden: ")]


def build(script: str, outside: Path) -> list[str]:
    return ["env", f"PYTHONPATH={HERE.parent}", sys.executable, str(HERE / script), str(outside)]


def welcome(running: Helper) -> Welcome:
    with running.connect(greet=False) as client:
        reply = client.ask(Hello(id=1, protocol=PROTOCOL, version="test"))
    assert isinstance(reply, Welcome)
    return reply


def test_without_the_sandbox_the_attempts_succeed(outside: Path) -> None:
    command = [*build("forbidden.py", outside), "helper"]
    (results,) = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    as_another_user = {"read /etc/shadow"} if os.geteuid() != 0 else set()
    refused = set(results) - set(unexpected(results)) - as_another_user
    # The sandbox cannot be shown to refuse what the kernel or this container refuses anyway.
    allowed = {"userfaultfd", "perf_event_open", "bpf", "keyctl", "add_key", "personality", "mount", "umount", "setns"}
    assert refused <= allowed, "each of these would test nothing"


def test_once_it_serves_neither_the_helper_nor_its_children_can_do_what_is_forbidden(
    helped: Helper, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    helped.command = build("build_helper.py", outside)
    (helped.directory / "sys/bus/pci/drivers/vfio-pci").mkdir()
    helped.start("--require-sandbox")
    with helped.connect() as client:
        reply = client.ask(ReadHeartbeat(id=1, address=address(PF)))
        assert isinstance(reply, Heartbeat), "it can do its work"
    assert helped.stop() == 0
    tried = answers(helped.log_text())
    assert len(tried) == 3, "in the loop, before and for a peer, and in a child"
    for results in tried:
        assert unexpected(results) == {}
    assert (outside / "there").read_text() == "untouched\n"
    assert os.listdir(outside) == ["there"]
    with capsys.disabled():
        print(f"\n{len(tried[0])} forbidden things tried in the helper and in a child of it: each refused")


SET_ID = """
import json, os, sys
from pathlib import Path
from qat_helper import main, serve
directory, begins = Path(sys.argv.pop(1)), serve.Server._listen
def created(mode, then=lambda descriptor: None):
    descriptor = os.open(directory / "program", os.O_WRONLY | os.O_CREAT, mode)
    try:
        os.write(descriptor, b"#!/bin/sh")
        then(descriptor)
    finally:
        os.close(descriptor)
def log():
    return os.open(directory / "audit.jsonl", os.O_RDONLY)
ways = {
    "created": lambda: created(0o6755),
    "created set-gid": lambda: created(0o2600),
    "created, then changed": lambda: created(0o600, lambda descriptor: os.fchmod(descriptor, 0o4755)),
    "changed by name": lambda: os.chmod(directory / "program", 0o4755),
    "the log, changed": lambda: os.fchmod(log(), 0o4755),
    "the log, to the server's group": lambda: os.fchmod(log(), 0o770),
    "the log, given away": lambda: os.fchown(log(), 1234, -1),
}
def attempt(way):
    try:
        way()
    except OSError as error:
        return error.errno
def serves(server):
    begins(server)
    os.write(2, f"set-id: {json.dumps({name: attempt(way) for name, way in ways.items()})}\\n".encode())
serve.Server._listen = serves
sys.exit(main.main())
"""


def test_no_set_uid_file_can_be_made_next_to_the_audit_log(helped: Helper) -> None:
    """Landlock mediates no chmod and lets the helper write there. Any user could run such a file as root."""
    helped.audit = helped.directory / "audit/audit.jsonl"
    helped.audit.parent.mkdir()
    helped.command = [sys.executable, "-c", SET_ID, str(helped.audit.parent)]
    helped.start("--require-sandbox")
    wait_until(lambda: "set-id: " in helped.log_text() and helped.log_text().endswith("\n"))
    (line,) = [line for line in helped.log_text().splitlines() if line.startswith("set-id: ")]
    found = json.loads(line.partition(" ")[2])
    modes = {path.name: oct(path.stat().st_mode & 0o7777) for path in helped.audit.parent.iterdir()}
    assert modes == {"audit.jsonl": "0o600", "program": "0o600"}
    assert helped.audit.stat().st_uid == os.geteuid()
    assert found == dict.fromkeys(found, errno.EPERM)


def test_a_complete_sandbox_is_reported_everywhere(helped: Helper) -> None:
    process = helped.start("--require-sandbox")
    assert "sandbox: capabilities, no-new-privs, no-core-dumps, landlock, seccomp" in helped.log_text()
    state = dict.fromkeys(("capabilities", "no-new-privs", "no-core-dumps", "landlock", "seccomp"), "")
    assert welcome(helped).sandbox == state
    assert helped.audit_lines()[0]["arguments"]["sandbox"] == "whole"
    text = Path(f"/proc/{process.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert {fields[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    if os.geteuid() == 0:
        assert fields["CapBnd"] == "0" * 16
        assert fields["Groups"].split() == []
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    assert fields["Uid"].split() == [str(os.geteuid())] * 4


WITHOUT_LANDLOCK = f"""
import os, sys
from qat_shared.seccomp import Profile, Rule, prepare
call = Rule(names=("landlock_create_ruleset",), action="SCMP_ACT_ERRNO", errno_ret={errno.ENOSYS})
prepare(Profile(default_action="SCMP_ACT_ALLOW", default_errno_ret=1, syscalls=(call,)))()
os.execv(sys.argv[1], sys.argv[1:])
"""
WITHOUT_LIBSECCOMP = """
import sys
from qat_helper import main
from qat_shared import seccomp
seccomp.LIBRARY = "libseccomp-that-is-not-there.so.2"
sys.exit(main.main())
"""
LACKING = {
    "landlock": ([sys.executable, "-c", WITHOUT_LANDLOCK], "not available in this kernel"),
    "seccomp": ([sys.executable, "-c", WITHOUT_LIBSECCOMP], "libseccomp-that-is-not-there.so.2"),
    "capabilities": (["setpriv", "--bounding-set=-setpcap"], "cannot empty the bounding set"),
}


@pytest.mark.parametrize("layer", LACKING)
def test_what_is_missing_is_told_and_fatal_on_request_only(helped: Helper, layer: str) -> None:
    if layer == "capabilities" and os.geteuid() != 0:
        pytest.skip("only root has capabilities to lack")
    before, why = LACKING[layer]
    helped.command = before if layer == "seccomp" else [*before, *helped.command]
    helped.start()
    assert f"the sandbox is incomplete: {layer}: " in helped.log_text()
    state = welcome(helped).sandbox
    assert why in state.pop(layer)
    assert set(state.values()) == {""}, "the other layers are in place"
    assert why in helped.audit_lines()[0]["arguments"]["sandbox"]
    assert helped.stop() == 0
    said = helped.start_failure("--require-sandbox")
    assert "--require-sandbox" in said
    assert why in said
    assert not helped.socket.exists()


def test_the_option_traceable_is_reported(helped: Helper) -> None:
    helped.start("--traceable")
    assert [layer for layer, lack in welcome(helped).sandbox.items() if lack] == ["no-core-dumps"]
    assert helped.stop() == 0
    assert "traceable" in helped.start_failure("--traceable", "--require-sandbox")


@needs_root
def test_a_confined_process_cannot_be_traced_by_its_own_user() -> None:
    profile = read_profile(sandbox.PROFILE)
    for traceable, owner in ((True, 1234), (False, 0)):

        def confined(traceable: bool = traceable, owner: int = owner) -> None:
            assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE; changing the uid cleared it
            confinement.confine((), profile, traceable=traceable)
            assert os.stat("/proc/self/mem").st_uid == owner  # proc(5): owned by root when it is not dumpable

        assert run_as_user(1234, 1234, [confined]) == 0


def test_inherited_descriptors_are_closed(helped: Helper) -> None:
    ours, theirs = os.pipe()
    process = helped.start("--traceable", pass_fds=(theirs,))
    os.close(theirs)
    assert os.read(ours, 1) == b"", "the other end is closed"
    os.close(ours)
    links = {os.readlink(f"/proc/{process.pid}/fd/{name}") for name in os.listdir(f"/proc/{process.pid}/fd")}
    kinds = sorted(re.sub(r"\[.*\]|\d+", "", link) for link in links)
    expected = {"/dev/null", "anon_inode:", "socket:", "pipe:", str(helped.audit), str(helped.log)}
    assert {re.sub(r"\[.*\]", "", link) for link in links} <= expected | {os.readlink("/proc/self/fd/1")}, kinds


@pytest.mark.parametrize(("number", "stays"), [("1", [3]), ("2", [3, 4]), ("0", []), ("x", []), ("", [])])
def test_descriptors_from_systemd_stay_open(number: str, stays: list[int]) -> None:
    script = (
        "import os, sys; from qat_helper.sandbox import close_inherited\n"
        "[os.dup2(0, at) for at in (3, 4, 5)]\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "close_inherited()\n"
        "print([at for at in range(3, 20) if os.path.exists(f'/proc/self/fd/{at}')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        check=True,
        capture_output=True,
        env=os.environ | {"LISTEN_FDS": number},
    )
    assert json.loads(done.stdout) == stays


def test_another_process_variables_are_not_ours() -> None:
    script = "import os; from qat_helper.sandbox import close_inherited; os.dup2(0, 3); close_inherited(); os.fstat(3)"
    environment = os.environ | {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=False)
    assert b"Bad file descriptor" in done.stderr


def test_the_kubelets_directories_may_come_after_the_helper(helped: Helper) -> None:
    folder = helped.directory / "kubelet/device-plugins"
    folder.rmdir()
    helped.start("--require-sandbox")
    folder.mkdir()
    from qat_shared.messages import Done, PrepareSocketDirectory

    with helped.connect() as client:
        assert isinstance(client.ask(PrepareSocketDirectory(id=1)), Done)
    assert (folder / "qat.intel.com").is_dir()


PLACES = {
    "pci0000:6b/0000:6b:00.0": ("4940", "pci0000:6b"),
    "pci0000:6b/0000:6b:00.1": ("4941 of 0000:6b:00.0", "pci0000:6b"),
    # Behind a switch, and behind a VMD controller.
    "pci0000:3a/0000:3a:00.0/0000:3b:00.0": ("37c8", "pci0000:3a/0000:3a:00.0"),
    "pci0000:00/0000:00:0e.0/pci10000:00/10000:00:01.0/10000:01:00.0": (
        "4944",
        "pci0000:00/0000:00:0e.0/pci10000:00/10000:00:01.0",
    ),
    "platform/soc/40000000.pcie/pci0002:00/0002:00:00.0": ("4946", "platform/soc/40000000.pcie/pci0002:00"),
    # In a VM: next to its disks, in a slot of its own, and in a domain of its own.
    "pci0000:00/0000:00:05.0": ("4941", "pci0000:00"),
    "pci0000:00/0000:00:06.0/0000:06:00.0": ("37c9", "pci0000:00/0000:00:06.0"),
    "LNXSYSTM:00/LNXSYBUS:00/VMBUS:00/f8ef-11/pci0001:00/0001:00:00.0": (
        "4943",
        "LNXSYSTM:00/LNXSYBUS:00/VMBUS:00/f8ef-11/pci0001:00",
    ),
    # Not QAT.
    "pci0000:17/0000:17:00.0": ("1592", None),
    "pci0000:00/0000:00:1f.2": ("a182", None),
}
"""Devices: their ids, and what of sysfs is granted for each."""


def test_writes_are_granted_next_to_qat_devices_only(tmp_path: Path) -> None:
    devices = tmp_path / "bus/pci/devices"
    devices.mkdir(parents=True)
    for path, (what, _) in PLACES.items():
        number, _, pf = what.partition(" of ")
        place = tmp_path / "devices" / path
        place.mkdir(parents=True)
        (devices / place.name).symlink_to(f"../../../devices/{path}")
        (place / "vendor").write_text("0x8086\n")
        (place / "device").write_text(f"0x{number}\n")
        if pf:
            (place / "physfn").symlink_to(f"../{pf}")
    (tmp_path / "devices/pci0000:fe").mkdir()  # a host bridge with nothing behind it
    (devices / "odd").mkdir()
    (devices / "0000:99:00.0").symlink_to("../../../devices/gone")
    rules = sandbox._rules(tmp_path, tmp_path / "kubelet", tmp_path / "run/helper.sock", tmp_path / "log/audit.jsonl")
    granted = {os.path.realpath(path) for path, rights in rules if rights == confinement.WRITE_FILE}
    expected = {f"devices/{place}" for _, place in PLACES.values() if place}
    assert granted == {str(tmp_path / name) for name in (*expected, "bus/pci/drivers", "bus/pci/drivers_probe")}


def test_only_the_pci_tree_can_be_written_in_sysfs(helped: Helper) -> None:
    """A device's directory that is a link to a place elsewhere in sysfs is not written there."""
    (helped.directory / "sys/bus/pci/drivers/vfio-pci").mkdir()
    elsewhere = helped.directory / "sys/devices/system" / "0000:6b:00.1"
    elsewhere.parent.mkdir()
    helped.tree.path(VF).rename(elsewhere)
    link = helped.directory / "sys/bus/pci/devices/0000:6b:00.1"
    link.unlink()
    link.symlink_to("../../../devices/system/0000:6b:00.1")
    (elsewhere / "driver_override").write_text("(null)\n")
    helped.audit = helped.directory / "audit/audit.jsonl"  # beneath its directory, it may write
    helped.audit.parent.mkdir()
    helped.start("--require-sandbox")
    with helped.connect() as client:
        reply = client.ask(BindDriver(id=1, address=address(VF), driver=DpdkDriver.VFIO_PCI))
    assert not isinstance(reply, Bound)
    assert getattr(reply, "errno", 0) == errno.EACCES
    assert (elsewhere / "driver_override").read_text() == "(null)\n"


def test_a_device_beneath_a_bridge_that_was_there_is_written(helped: Helper) -> None:
    helped.audit = helped.directory / "audit/audit.jsonl"
    helped.audit.parent.mkdir()
    helped.start("--require-sandbox")
    override = helped.tree.path(VF) / "driver_override"
    override.write_text("(null)\n")
    (helped.directory / "sys/bus/pci/drivers/vfio-pci").mkdir()
    for name in ("bus/pci/drivers_probe", "bus/pci/drivers/4xxxvf/unbind"):
        (helped.directory / "sys" / name).write_text("")
    with helped.connect() as client:
        client.ask(BindDriver(id=1, address=address(VF), driver=DpdkDriver.VFIO_PCI))
    wait_until(lambda: override.read_text() != "(null)\n")
