"""While a process has a VF open: nothing is written that would block; and if it is after all, only that VF waits."""

import asyncio
import functools
import os
import signal
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from kernel.nodes import PF, SMALL, VF, VF2
from kernel.real_node import PATIENCE, RealNode, real_node
from kubelet.nodes import CY
from qat_shared.messages import (
    AnyReply,
    BindDriver,
    Bound,
    DpdkDriver,
    ErrorCode,
    Failure,
    Heartbeat,
    ReadHeartbeat,
    ReleaseDriver,
)
from qat_shared.pci import PciAddress
from support.helper_process import Client


def release(client: Client, address: str) -> AnyReply:
    return client.ask(ReleaseDriver(id=1, address=PciAddress.parse(address)))


def bind(client: Client, address: str) -> bool:
    """Ask for it: whether it is bound. Where the machine is slow, not before it has been asked for again."""
    reply = client.ask(BindDriver(id=1, address=PciAddress.parse(address), driver=DpdkDriver.VFIO_PCI))
    assert isinstance(reply, Bound) or (
        isinstance(reply, Failure) and reply.code in (ErrorCode.TIMED_OUT, ErrorCode.BUSY)
    ), reply
    return isinstance(reply, Bound)


@contextmanager
def traced(node: RealNode, log: Path) -> Iterator[Callable[[], list[str]]]:
    """What the helper and its children open for writing beneath /sys, as the kernel is asked."""
    assert node.helper is not None
    command = ["strace", "--follow-forks", "--trace=open,openat,write", "--output", str(log)]
    tracer = subprocess.Popen([*command, f"--attach={node.helper.pid}"], stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    assert b"attached" in tracer.stderr.readline()
    try:
        yield lambda: [line for line in log.read_text().splitlines() if "O_WRONLY" in line or "O_RDWR" in line]
    finally:
        tracer.terminate()
        tracer.wait()
        tracer.stderr.close()


@asynccontextmanager
async def helper_alone(*wrapper: str) -> AsyncIterator[tuple[RealNode, Client]]:
    """A node where only the helper runs, started by `wrapper`, and has bound two VFs; and a connection to it."""
    async with real_node(SMALL) as node:
        node.helper_wrapper = wrapper
        node.start_helper()
        await node.until("the helper serves", lambda: "serving on" in node.log("helper"))
        with node.ask() as client:
            for vf in (VF, VF2):
                await node.until(f"{vf} is bound", functools.partial(bind, client, vf))
            yield node, client


@asynccontextmanager
async def traced_helper(log: Path) -> AsyncIterator[tuple[RealNode, Client, Callable[[], list[str]]]]:
    """As `helper_alone`, and what it writes to."""
    async with helper_alone() as (node, client):
        with traced(node, log) as writes:
            yield node, client, writes


async def test_a_vf_in_use_is_refused_without_a_write_and_released_afterwards(tmp_path: Path) -> None:
    async with traced_helper(tmp_path / "trace") as (node, client, writes):
        with node.real.open_vfio(VF):
            reply = release(client, VF)
            assert isinstance(reply, Failure), reply
            assert reply.code is ErrorCode.BUSY
            assert "in use through vfio-pci" in reply.message
            assert [line for line in writes() if VF in line or "unbind" in line or "driver_override" in line] == []
            # Its neighbour is nobody's: there the writes are seen.
            assert isinstance(release(client, VF2), Bound)
            assert any("unbind" in line for line in writes())
        assert node.real.driver(VF) == "vfio-pci"
        assert isinstance(release(client, VF), Bound)
        assert node.real.driver(VF) == "4xxxvf"


def blocked_children(node: RealNode) -> list[int]:
    """The helper's children that wait inside the kernel for vfio to let go."""
    assert node.helper is not None
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if parent == str(node.helper.pid) and "vfio" in (entry / "stack").read_text():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
    return found


def heartbeats(client: Client, number: int = 150) -> list[float]:
    """How long each answer took, in seconds."""
    times = []
    for each in range(number):
        began = time.monotonic()
        reply = client.ask(ReadHeartbeat(id=each, address=PciAddress.parse(PF)))
        times.append(time.monotonic() - began)
        assert isinstance(reply, Heartbeat), reply
    return times


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


def blind_to_use(directory: Path, vf: str) -> tuple[str, ...]:
    """The race, forced: to the helper that this starts, and to it alone, `enable` says that nobody has the VF open."""
    idle = directory / "idle"
    idle.write_text("0\n")
    enable = os.path.realpath(f"/sys/bus/pci/devices/{vf}/enable")
    program = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", program, "sh", str(idle), enable)


async def test_in_the_race_left_over_others_are_answered(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with helper_alone(*blind_to_use(tmp_path, VF)) as (node, client):
        with node.ask() as other:
            before = heartbeats(other)
            with node.real.open_vfio(VF):
                client.sock.settimeout(PATIENCE)
                client.send(ReleaseDriver(id=1, address=PciAddress.parse(VF)))
                await node.until("the child waits inside the kernel", lambda: blocked_children(node))
                (child,) = blocked_children(node)
                during = heartbeats(other)
                for _ in range(20):
                    if p99(during) < 10 * p99(before):
                        break
                    during = heartbeats(other)  # the machine may have stalled; were they held up, they always would be
                assert p99(during) < 10 * p99(before)
                assert blocked_children(node) == [child], "it waited all the time"
                reply = await asyncio.to_thread(client.receive)
                assert isinstance(reply, Failure)
                assert reply.code is ErrorCode.TIMED_OUT
                again = release(client, VF)
                assert isinstance(again, Failure)
                assert again.code is ErrorCode.BUSY
                assert isinstance(release(client, VF2), Bound), "its neighbour is not held up"
            await node.until("it happens when the VF is closed", lambda: node.real.driver(VF) == "4xxxvf")
            await node.until("the child has ended", lambda: not blocked_children(node))
            await node.until("another can be bound", functools.partial(bind, client, VF2))
        record_property(
            "measured",
            f"ReadHeartbeat, p99 of {len(before)}: {p99(before) * 1e3:.1f} ms idle, "
            f"{p99(during) * 1e3:.1f} ms while a write waits",
        )


@pytest.mark.guest("iommu", fresh=True)  # a child that cannot be killed: should it stay, nobody else has it
async def test_a_waiting_child_cannot_even_be_killed_and_the_server_mends_what_it_leaves(tmp_path: Path) -> None:
    async with helper_alone(*blind_to_use(tmp_path, VF)) as (node, client):
        with node.real.open_vfio(VF):
            client.send(ReleaseDriver(id=1, address=PciAddress.parse(VF)))
            await node.until("the child waits inside the kernel", lambda: blocked_children(node))
            (child,) = blocked_children(node)
            os.kill(child, signal.SIGKILL)
            await node.until("the signal is there", lambda: state_of(child) == "D")
            assert isinstance(release(client, VF2), Bound), "its neighbour is not held up"
            assert state_of(child) == "D"
        await node.until("it has ended", lambda: not blocked_children(node))
        assert node.real.driver(VF) is None, "killed before it could offer it to the drivers"
        await node.start_again({CY: 4})
        assert node.real.driver(VF) == "vfio-pci"


def state_of(pid: int) -> str:
    """One letter, as in ps; D: it waits, and no signal ends that."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
