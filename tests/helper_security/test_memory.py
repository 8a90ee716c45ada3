"""The helper's memory at its worst, and a command of `kubectl exec`, fit into the limit of the helper's container."""

import os
import select
import signal
import subprocess
import sys
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from helper_security.figures import most
from qat_helper.serve import MAX_PEERS, MAX_QUEUE
from qat_shared.messages import (
    PROTOCOL,
    AnyRequest,
    BindDriver,
    DpdkDriver,
    ErrorCode,
    Failure,
    Heartbeat,
    Hello,
    ReadDeviceConfig,
    ReadHeartbeat,
    ReleaseDriver,
    Service,
    SetAutoReset,
    SetNumVfs,
    SetPmIdle,
    SetServices,
    Welcome,
)
from support.conditions import wait_until
from support.helper_process import COMMAND, PF, Client, Helper, helper
from support.memory_limit import MemoryLimit, manifest_limit, memory_limit
from support.sysfs_tree import address

PFS = [f"{0x70 + number:02x}:00.0" for number in range(16)]
BOUND = [f"70:{number // 8:02x}.{number % 8}" for number in range(1, 17)]
"""VFs whose unbind from their kernel driver hangs."""
OPEN = [f"70:{number // 8:02x}.{number % 8}" for number in range(17, 21)]
"""VFs whose unbind from vfio-pci hangs."""
REASON = "x" * 64
"""The longest."""
OPENAT = "257"
"""The system call's number, as /proc shows it."""
EXEC = 8 << 20
"""Bytes for what a container runtime runs in the container to start a command there."""


def hanging_node(running: Helper) -> None:
    """PFs and VFs whose attributes hang as soon as `hang` is called."""
    tree = running.tree
    for pf in PFS:
        tree.pf(pf, sriov_numvfs="0")
        debugfs(running, pf).joinpath("heartbeat").mkdir(parents=True)
        (debugfs(running, pf) / "heartbeat/status").write_text("0\n")
        (debugfs(running, pf) / "dev_cfg").write_text("x" * 32 * 1024)
        for attribute in ("qat/cfg_services", "qat/pm_idle_enabled", "qat/auto_reset", "sriov_drivers_autoprobe"):
            tree.path(pf).joinpath(attribute).unlink(missing_ok=True)
            os.mkfifo(tree.path(pf) / attribute)
    for vfs, driver in ((BOUND, "4xxxvf"), (OPEN, "vfio-pci")):
        for vf in vfs:
            tree.vf(vf, PFS[0], driver, driver_override="(null)")
        os.mkfifo(tree.root / f"bus/pci/drivers/{driver}/unbind")


def debugfs(running: Helper, pf: str) -> Path:
    return running.tree.root / f"kernel/debug/qat_4xxx_0000:{pf}"


def requests() -> list[AnyRequest]:
    """More than there are children for, of every operation whose device hangs; but few heartbeats."""
    of_vfs: tuple[AnyRequest, ...] = (
        *(BindDriver(id=1, address=address(vf), driver=DpdkDriver.VFIO_PCI, reason=REASON) for vf in BOUND),
        *(ReleaseDriver(id=1, address=address(vf), reason=REASON) for vf in OPEN),
    )
    of_pfs = (
        each
        for first, second, third, fourth in zip(*[iter(PFS[1:])] * 4, strict=False)
        for each in (
            SetServices(id=1, address=address(first), services=(Service.DC,), reason=REASON),
            SetPmIdle(id=1, address=address(second), on=True, reason=REASON),
            SetAutoReset(id=1, address=address(third), on=True, reason=REASON),
            SetNumVfs(id=1, address=address(fourth), count=16, reason=REASON),
        )
    )
    reads = (ReadDeviceConfig(id=1, address=address(pf), reason=REASON) for pf in PFS)
    heartbeats = (ReadHeartbeat(id=1, address=address(pf), reason=REASON) for pf in PFS[:3])
    return [*of_vfs, *of_pfs, *reads, *heartbeats]


def fill(running: Helper, client: Client, witness: Client, replies: int | None) -> int:
    """Request so many of the longest replies and read none; None: until it is dropped. Returns the number."""
    poll = select.poll()
    poll.register(client.sock, 0)
    for number in count(1):
        client.send(ReadDeviceConfig(id=number, address=address(PFS[0])))
        greet(witness)  # it has received the request
        wait_until(lambda: not running.children())
        greet(witness)  # it has sent or queued the reply
        dropped = bool(poll.poll(0))
        assert not dropped or replies is None
        if dropped or number == replies:
            break
    return number


def greet(client: Client) -> None:
    """Ask for a Welcome and wait for it, past the replies that come before it."""
    client.send(Hello(id=0, protocol=PROTOCOL, version="test"))
    while not isinstance(reply := client.receive(), Welcome):
        assert not (isinstance(reply, Failure) and reply.code is ErrorCode.MALFORMED), reply


def hang(running: Helper) -> None:
    for pf in PFS:
        for name in ("heartbeat/status", "dev_cfg"):
            (debugfs(running, pf) / name).unlink()
            os.mkfifo(debugfs(running, pf) / name)


def all_hang(running: Helper, limit: MemoryLimit) -> bool:
    """Whether each child waits for a device, in open(). Not so where the kernel has killed the helper."""
    children = running.children()
    calls = {Path(f"/proc/{child}/syscall").read_text().split()[0] for child in children}
    return calls == {OPENAT} or limit.oom_kills() > 0


def test_hanging_devices_and_unread_replies_fit_into_the_containers_limit() -> None:
    with memory_limit(manifest_limit("helper")) as limit, helper(start=False) as running:
        running.command = limit.wrapped([COMMAND])
        hanging_node(running)
        running.start()
        try:
            occupy(running, limit)
            verify = limit.wrapped([COMMAND, "audit", "verify", str(running.audit)])
            subprocess.run(verify, check=True, stdout=subprocess.DEVNULL)
            limit.note("a helper whose devices hang, and whose peers read nothing")
        finally:
            limit.check()


def occupy(running: Helper, limit: MemoryLimit) -> None:
    """All peers have the longest queues, and all operations hang."""
    with ExitStack() as stack:
        witness = stack.enter_context(running.connect())
        with running.connect() as client:
            unread = fill(running, client, witness, None) - 4  # how many fit into a socket varies a little
        assert unread >= MAX_QUEUE
        for _ in range(MAX_PEERS - 1):
            fill(running, stack.enter_context(running.connect()), witness, unread)
        most("KiB of the helper's container with unread replies", limit.use() >> 10)
        hang(running)
        for request in requests():
            witness.send(request)
        greet(witness)
        wait_until(lambda: all_hang(running, limit))
        most("children of a helper whose devices hang", len(running.children()))
        most("KiB of the helper's container with hanging devices too", limit.use() >> 10)
        witness.send(ReadHeartbeat(id=2, address=address(PF)))
        while (reply := witness.receive()).id != 2:
            pass
        assert isinstance(reply, Heartbeat), "a device that does not hang is served"
        assert limit.use() + EXEC < limit.limit


SLOW_TO_CLOSE = """
import os, sys, time
from qat_helper import main
fork = os.fork
def forked():
    pid = fork()
    while pid == 0 and sys._getframe(1).f_code.co_name == "_close_dropped" and not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    return pid
os.fork = forked
sys.exit(main.main(sys.argv[2:]))
"""


def test_one_process_at_a_time_closes_what_dropped_peers_left_unread() -> None:
    with helper(start=False) as running:
        go_on = running.directory / "go on"
        running.command = [sys.executable, "-c", SLOW_TO_CLOSE, str(go_on)]
        running.start()
        assert running.process is not None
        with running.connect() as witness:
            before = running.open_files_when_idle(witness)
            for _ in range(5):
                running.process.send_signal(signal.SIGSTOP)
                with running.connect(greet=False) as client:
                    for _ in range(5):
                        client.send(b"nonsense")
                running.process.send_signal(signal.SIGCONT)
                greet(witness)
                wait_until(running.children)
                assert len(running.children()) == 1
            go_on.touch()
            wait_until(lambda: not running.children() and running.open_files() == before)
