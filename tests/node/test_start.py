"""When the service manager is told that the server has started: with its devices, and without a kubelet."""

import errno
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qat_server.host.service_manager import VARIABLE
from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import RunningNode, running_node

CY = "qat.intel.com/cy"
PFS = ("0000:6b:00.0", "0001:6b:00.0")
VFS = tuple(f"{pf[:-1]}{number}" for pf in PFS for number in (1, 2, 3, 4))
AS_BOOTED = Node(pfs=tuple(Pf(address=pf, services="dc", total_vfs=4, num_vfs=0) for pf in PFS))
STAGES = {"done", "impossible"}
NEVER, SOON = 3600.0, 0.5
READY = "READY=1\nSTATUS="


class Supervisor:
    """The socket that systemd would have."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(place.replace("@", "\0", 1))

    def heard(self) -> str:
        """The next datagram, "" when there is none."""
        try:
            return self._sock.recv(4096).decode()
        except BlockingIOError:
            return ""

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Booted:
    """A node as after a boot: PFs without VFs, a kubelet that is not there yet, a configuration that wants sym;asym."""

    def __init__(self, node: RunningNode, supervisor: Supervisor) -> None:
        self.node = node
        self.supervisor = supervisor

    def start_server(self, monkeypatch: pytest.MonkeyPatch, start_timeout: float = NEVER) -> None:
        """As systemd does, with another timeout for the start."""
        program, *options = self.node.server_command()
        assert Path(program).name == "qat-plugin"
        within = (
            "import functools\nfrom qat_server import main, process\n"
            f"process.run = functools.partial(process.run, start_timeout={start_timeout})\nmain.main()"
        )
        monkeypatch.setattr(self.node, "server_command", lambda: [sys.executable, "-c", within, *options])
        with monkeypatch.context() as environment:
            environment.setenv(VARIABLE, self.supervisor.place)
            self.node.start_server()

    async def told(self) -> str:
        """The next thing that the service manager hears."""
        return await self.node.until("the service manager is told", self.supervisor.heard)

    def bound(self) -> list[str]:
        states = self.node.kernel.snapshot()
        return [str(vf) for vf, state in states.items() if state.pf is not None and state.driver == "vfio-pci"]


@asynccontextmanager
async def booted(place: str = "", described: Node = AS_BOOTED) -> AsyncIterator[Booted]:
    async with running_node(described) as node:
        await node.kubelet.stop()
        (node.directory / "config").mkdir()
        (node.directory / "config/qat.conf").write_text("ServicesEnabled=sym;asym\n")
        node.add_server_options(f"--provisioning-config={node.directory / 'config'}", "--resync-interval=1h")
        supervisor = Supervisor(place or str(node.directory / "notify"))
        try:
            yield Booted(node, supervisor)
        finally:
            supervisor.close()


async def test_it_is_told_once_all_vfs_are_bound_and_not_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"@qat-{os.getpid()}-{secrets.token_hex(8)}" if kind == "abstract" else ""
    async with booted(place) as at:
        node = at.node
        at.start_server(monkeypatch)
        await node.until_status("it is looking", lambda status: "helper" in " ".join(status.not_ready))
        assert at.supervisor.heard() == "", "without its helper it has nothing"
        node.kernel.hang("driver_override", VFS[-1])
        node.start_helper()
        await node.until("all others are bound", lambda: len(at.bound()) == len(VFS) - 1)
        await node.until_status(
            "and known to be", lambda status: sum(vf.driver == "vfio-pci" for vf in status.vfs) == len(VFS) - 1
        )
        assert at.supervisor.heard() == "", "one VF is still being bound"
        node.kernel.release("driver_override", VFS[-1])
        assert await at.told() == f"{READY}started with {len(VFS)} {CY}\n"
        assert at.bound() == list(VFS)
        assert not (await node.status()).ready, "that is said of a server that is registered"
        await node.kubelet.start()
        await node.until("registered", lambda: node.kubelet.allocatable() == {CY: len(VFS)})
        assert at.supervisor.heard() == "", "once is enough"
        assert await node.stop_server() == 0
        assert at.supervisor.heard() == "STOPPING=1\nSTATUS=stopping\n"


async def test_a_helper_that_is_missing_holds_nothing_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async with booted() as at:
        at.start_server(monkeypatch, SOON)
        said = await at.told()
        assert said.startswith(f"{READY}waited {SOON:g} s, and went on without: "), said
        assert "the helper" in said, said
        # Where the machine is slow, it may not even have tried to reach it by then.
        status = await at.node.until_status(
            "it says why", lambda status: "cannot reach the helper" in " ".join(status.not_ready)
        )
        assert " ".join(status.not_ready).count("cannot reach the helper") == 1, status.not_ready
        at.node.start_helper()
        assert await at.told() == f"{READY}started with {len(VFS)} {CY}\n"
        assert at.bound() == list(VFS)


async def test_a_vf_that_cannot_be_bound_holds_nothing_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async with booted() as at:
        at.node.kernel.hang("driver_override", VFS[2])
        at.node.start_helper()
        at.start_server(monkeypatch, SOON)
        said = await at.told()
        assert said.startswith(f"{READY}waited {SOON:g} s, and went on without: "), said
        await at.node.kubelet.start()
        await at.node.until("the others are served", lambda: at.node.kubelet.allocatable() == {CY: len(VFS) - 1})
        assert at.supervisor.heard() == ""
        at.node.kernel.release("driver_override", VFS[2])
        assert await at.told() == f"{READY}started with {len(VFS)} {CY}\n"


async def test_a_vf_that_fails_at_first_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with booted() as at:
        at.node.kernel.fail_next(VFS[2], "driver_override", errno.EBUSY)
        at.node.start_helper()
        at.start_server(monkeypatch)
        assert await at.told() == f"{READY}started with {len(VFS)} {CY}\n"
        assert at.bound() == list(VFS)


async def test_a_pf_whose_driver_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with booted() as at:
        node = at.node
        node.kernel.unbind(PFS[1])
        node.start_helper()
        at.start_server(monkeypatch)
        await node.until_status(
            "the other PF's VFs are bound", lambda status: [vf.driver for vf in status.vfs] == ["vfio-pci"] * 4
        )
        assert at.supervisor.heard() == ""
        node.kernel.probe(PFS[1])
        assert await at.told() == f"{READY}started with {len(VFS)} {CY}\n"


async def test_a_pf_whose_driver_is_not_done_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is on its driver before that has made its attributes."""
    async with booted() as at:
        node = at.node
        node.add_server_options("--resync-interval=50ms")
        services = node.kernel.sysfs_root / f"devices/pci{PFS[1][:7]}/{PFS[1]}/qat/cfg_services"
        services.rename(node.directory / "cfg_services")
        node.start_helper()
        at.start_server(monkeypatch)
        await node.until_status(
            "only that PF is not as wanted", lambda status: {each.stage for each in status.provisioning} == STAGES
        )
        assert at.supervisor.heard() == ""
        (node.directory / "cfg_services").rename(services)
        assert await at.told() == f"{READY}started with {len(VFS)} {CY}\n"


async def test_what_is_denied_or_refused_for_good_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, helper_policy: Callable[[str], None]
) -> None:
    helper_policy(f"addresses = [{', '.join(repr(each) for each in (PFS[0], *VFS[:3]))}]\n")
    async with booted() as at:
        at.node.start_helper()
        at.start_server(monkeypatch)
        assert await at.told() == f"{READY}started with 3 {CY}\n"
        assert at.bound() == list(VFS[:3])


async def test_what_only_the_kubelet_can_tell_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether pods have VFs that would be taken away: the kubelet waits for this start itself."""
    async with booted(described=Node(pfs=(Pf(address=PFS[0], services="dc", total_vfs=4, num_vfs=4),))) as at:
        at.node.start_helper()
        at.start_server(monkeypatch)
        assert await at.told() == f"{READY}started with no devices\n"
        await at.node.kubelet.start()
        await at.node.until("provisioned then", lambda: at.node.kubelet.allocatable().get(CY) == 4)


async def test_without_a_service_manager_nothing_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    async with booted() as at:
        at.node.start_helper()
        at.node.start_server()
        await at.node.kubelet.start()
        await at.node.until_status("ready", lambda status: status.ready)
        assert at.supervisor.heard() == ""
        assert "service manager" not in at.node.log("server")
