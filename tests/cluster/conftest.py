"""One guest for all tests of a node, one for all of a cluster, each booted when the first asks for it; what must be on
it, each test says (`installed`, Cluster.install).

Tests may come in any order: what a test finds installed that it did not ask for is taken away first. Those that ask for
the same stand in one file, so that this is seldom.
"""

import subprocess
from collections.abc import Iterator

import pytest

from cluster import control_plane, disk, installation, machine
from cluster.cluster_node import Cluster
from cluster.installation import Installation
from cluster.machine import Machine
from cluster.node import KubeletNode
from kernel.machine import PROJECT

APPARMOR = ("apparmor=1", "security=apparmor")


@pytest.fixture(scope="session")
def guest() -> Iterator[Machine]:
    if reason := machine.why_not() or disk.why_not():
        pytest.skip(reason)
    subprocess.run([PROJECT / "tests/deployments/tools/build"], check=True)
    with Machine(disk.disk(), words=APPARMOR) as running:
        installation.lines.append(f"QEMU's start to the first command in the guest: {running.booted():.1f} s")
        yield running


@pytest.fixture(scope="session")
def started(guest: Machine) -> KubeletNode:
    node = KubeletNode(guest)
    node.start()
    return node


@pytest.fixture(scope="session")
def installed(started: KubeletNode) -> Installation:
    return Installation(started)


@pytest.fixture
def node(started: KubeletNode) -> Iterator[KubeletNode]:
    """The node; pods that a test leaves are removed."""
    before = set(started.pods())
    yield started
    if left := set(started.pods()) - before:
        started.withdraw(*left)


@pytest.fixture(scope="session")
def started_cluster() -> Iterator[Cluster]:
    if reason := machine.why_not() or disk.why_not():
        pytest.skip(reason)
    subprocess.run([PROJECT / "tests/deployments/tools/build"], check=True)
    programs = (*control_plane.PROGRAMS, "kubelet", "nfd-master", "nfd-worker")
    image = disk.disk(programs, with_images=("helper", "server", "dpdk", "openssl"))
    with Machine(image, memory=6144, words=APPARMOR) as running:
        installation.lines.append(f"QEMU's start to the first command in the guest: {running.booted():.1f} s")
        found = Cluster(running)
        found.start()
        yield found


@pytest.fixture
def cluster(started_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; pods that a test leaves are removed."""
    yield started_cluster
    started_cluster.delete("--all")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if installation.lines:
        terminalreporter.section("measured on the node")
        for line in installation.lines:
            terminalreporter.write_line(line)
