"""The kubelet's directory and sockets and the QAT driver's debugfs files, as the helper uses them."""

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat_helper.dispatch import perform
from qat_helper.operations.kubelet import UMASK, open_unprepared, repair
from qat_helper.operations.node import Node, Outcome
from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy
from qat_shared.messages import (
    Connected,
    DeviceConfig,
    Done,
    ErrorCode,
    Failure,
    Heartbeat,
    OpenPodResources,
    PrepareSocketDirectory,
    ReadDeviceConfig,
    ReadHeartbeat,
    SocketDirectory,
)
from support.sysfs_tree import SysfsTree, address

PF, VF = "6b:00.0", "6b:00.1"
FOLDERS = ("device-plugins", "pod-resources")
FOLDER_OF = {SocketDirectory.DEVICE_PLUGINS: "device-plugins", SocketDirectory.PLUGINS_REGISTRY: "plugins_registry"}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    # Deep: a socket path is limited to 107 bytes, and the kubelet's directory may be anywhere.
    kubelet = tmp_path / ("deep" * 20) / ("deeper" * 10)
    for folder in FOLDERS:
        (kubelet / folder).mkdir(parents=True)
    tree = SysfsTree(tmp_path / "sys")
    tree.pf(PF)
    tree.vf(VF, PF)
    debugfs = tree.root / "kernel/debug/qat_4xxx_0000:6b:00.0"
    (debugfs / "heartbeat").mkdir(parents=True)
    (debugfs / "heartbeat/status").write_text("0\n")
    (debugfs / "dev_cfg").write_text("[GENERAL]\nServicesEnabled = sym;asym\n")
    policy = Policy(uids=frozenset(), operations=NAMES)
    yield Node(sysfs_root=tree.root, kubelet_dir=kubelet, server_gid=os.getegid(), policy=policy)


def listen(folder: Path) -> socket.socket:
    """Listen on kubelet.sock in the directory, however long its path is."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(folder, os.O_PATH)
    listener.bind(f"/proc/self/fd/{directory}/kubelet.sock")
    os.close(directory)
    listener.listen()
    return listener


def open_socket(node: Node, wait_ms: int = 0) -> Outcome:
    return perform(node, OpenPodResources(id=7, wait_ms=wait_ms))


def code(outcome: Outcome) -> ErrorCode:
    assert isinstance(outcome.reply, Failure)
    assert outcome.descriptor is None
    return outcome.reply.code


def test_the_kubelets_socket_is_connected_to(node: Node) -> None:
    with listen(node.kubelet_dir / "pod-resources") as kubelet:
        reply, descriptor = open_socket(node)
        assert isinstance(reply, Connected)
        assert reply.id == 7
        with socket.socket(fileno=descriptor) as ours, kubelet.accept()[0] as theirs:
            assert ours.getblocking()
            ours.sendall(b"hello")
            assert theirs.recv(10) == b"hello"


def test_without_a_kubelet_there_is_no_socket(node: Node) -> None:
    assert code(open_socket(node)) is ErrorCode.UNAVAILABLE
    listen(node.kubelet_dir / "pod-resources").close()  # a stale socket
    assert code(open_socket(node)) is ErrorCode.UNAVAILABLE
    (node.kubelet_dir / "pod-resources/kubelet.sock").unlink()
    (node.kubelet_dir / "pod-resources").rmdir()
    assert code(open_socket(node)) is ErrorCode.UNAVAILABLE


def test_a_kubelet_without_the_service_is_told_from_none(node: Node) -> None:
    with listen(node.kubelet_dir / "device-plugins") as kubelet:
        assert code(open_socket(node)) is ErrorCode.UNSUPPORTED
        with kubelet.accept()[0] as probe:
            assert probe.recv(1) == b"", "the probe is closed at once, and nobody has a copy"
        listen(node.kubelet_dir / "pod-resources").close()
        assert code(open_socket(node)) is ErrorCode.UNAVAILABLE, "it has had the service, and will have it again"


def test_it_waits_for_a_kubelet_that_starts_late(node: Node) -> None:
    listeners: list[socket.socket] = []
    begun = time.monotonic()

    def later() -> None:
        while time.monotonic() < begun + 0.15:
            time.sleep(0.01)
        listeners.append(listen(node.kubelet_dir / "pod-resources"))

    thread = threading.Thread(target=later)
    thread.start()
    reply, descriptor = open_socket(node, wait_ms=10_000)
    thread.join()
    assert isinstance(reply, Connected)
    assert descriptor is not None
    os.close(descriptor)
    listeners[0].close()


def test_a_socket_of_another_type_is_a_kernel_error(node: Node) -> None:
    folder = os.open(node.kubelet_dir / "pod-resources", os.O_PATH)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(f"/proc/self/fd/{folder}/kubelet.sock")
        assert code(open_socket(node, wait_ms=10_000)) is ErrorCode.KERNEL
    os.close(folder)


def prepare(node: Node, directory: SocketDirectory = SocketDirectory.DEVICE_PLUGINS) -> Outcome:
    return perform(node, PrepareSocketDirectory(id=1, directory=directory))


@pytest.mark.usefixtures("umask")
def test_only_the_requested_directory_is_created(node: Node) -> None:
    (node.kubelet_dir / "plugins_registry").mkdir()
    assert isinstance(prepare(node, SocketDirectory.PLUGINS_REGISTRY).reply, Done)
    assert [str(path.relative_to(node.kubelet_dir)) for path in node.kubelet_dir.glob("*/*")] == [
        "plugins_registry/qat.intel.com"
    ]


@pytest.fixture
def umask() -> Iterator[None]:
    """The helper's own, which it sets at its start."""
    before = os.umask(UMASK)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("word", SocketDirectory)
def test_the_socket_directory_is_created(node: Node, word: SocketDirectory) -> None:
    directory = node.kubelet_dir / FOLDER_OF[word] / "qat.intel.com"
    directory.parent.mkdir(mode=0o750, exist_ok=True)
    for _ in range(2):
        assert isinstance(prepare(node, word).reply, Done)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o770


def repair_at_start(node: Node, directory: SocketDirectory, gid: int) -> None:
    descriptor = open_unprepared(node.kubelet_dir, directory, gid)
    assert descriptor is not None
    repair(descriptor, gid)
    os.close(descriptor)
    assert open_unprepared(node.kubelet_dir, directory, gid) is None


@pytest.mark.parametrize("mode", [0o755, 0o2770, 0o700])
@pytest.mark.parametrize("word", SocketDirectory)
def test_an_existing_socket_directory_is_repaired_at_the_start_only(
    node: Node, word: SocketDirectory, mode: int
) -> None:
    directory = node.kubelet_dir / FOLDER_OF[word] / "qat.intel.com"
    directory.mkdir(parents=True)
    directory.chmod(mode)  # 0755: as the kubelet makes a DirectoryOrCreate
    reply = prepare(node, word).reply
    assert code(Outcome(reply)) is ErrorCode.KERNEL
    assert "restart it if" in getattr(reply, "message", "")
    assert stat.S_IMODE(directory.stat().st_mode) == mode
    repair_at_start(node, word, node.server_gid)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o770
    assert isinstance(prepare(node, word).reply, Done)


@pytest.mark.usefixtures("umask")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root is in every group")
def test_the_socket_directory_is_given_to_the_servers_group(node: Node) -> None:
    other = Node(sysfs_root=node.sysfs_root, kubelet_dir=node.kubelet_dir, server_gid=4321, policy=node.policy)
    directory = node.kubelet_dir / "device-plugins/qat.intel.com"

    def expected() -> None:
        status = directory.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (os.geteuid(), 4321, 0o770)

    before = os.getegid()
    os.setegid(4321)  # as join_group does
    try:
        assert isinstance(prepare(other).reply, Done)
    finally:
        os.setegid(before)
    expected()
    os.chown(directory, -1, before)
    assert code(prepare(other)) is ErrorCode.KERNEL
    repair_at_start(node, SocketDirectory.DEVICE_PLUGINS, 4321)
    expected()


def test_the_repair_at_the_start_follows_no_link(node: Node, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place = node.kubelet_dir / "device-plugins/qat.intel.com"
    place.symlink_to(tmp_path / "elsewhere")
    assert open_unprepared(node.kubelet_dir, SocketDirectory.DEVICE_PLUGINS, node.server_gid) is None
    place.unlink()
    place.write_text("x")
    assert open_unprepared(node.kubelet_dir, SocketDirectory.DEVICE_PLUGINS, node.server_gid) is None
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o700


def test_anything_but_a_directory_is_left_unchanged(node: Node, tmp_path: Path) -> None:
    place = node.kubelet_dir / "device-plugins/qat.intel.com"
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    assert code(prepare(node)) is ErrorCode.KERNEL
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o700
    place.unlink()
    place.write_text("x")
    assert code(prepare(node)) is ErrorCode.KERNEL
    place.unlink()
    (node.kubelet_dir / "device-plugins").rmdir()
    assert code(prepare(node)) is ErrorCode.UNAVAILABLE
    assert code(prepare(node, SocketDirectory.PLUGINS_REGISTRY)) is ErrorCode.UNAVAILABLE
    (node.kubelet_dir / "plugins_registry").symlink_to(tmp_path / "elsewhere")
    assert code(prepare(node, SocketDirectory.PLUGINS_REGISTRY)) is ErrorCode.UNAVAILABLE
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(("text", "alive"), [("0\n", True), ("-1\n", False), ("-1", False), ("0\nmore\n", True)])
def test_heartbeats(node: Node, text: str, alive: bool) -> None:
    (node.sysfs_root / "kernel/debug/qat_4xxx_0000:6b:00.0/heartbeat/status").write_text(text)
    reply = perform(node, ReadHeartbeat(id=1, address=address(PF))).reply
    assert isinstance(reply, Heartbeat)
    assert reply.alive is alive


def test_the_device_configuration(node: Node) -> None:
    reply = perform(node, ReadDeviceConfig(id=1, address=address(PF))).reply
    assert isinstance(reply, DeviceConfig)
    assert "ServicesEnabled = sym;asym" in reply.text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"1\n", b"x" * 10_000, b"\n-1\n"])
def test_a_malformed_heartbeat_is_neither_alive_nor_dead(node: Node, content: bytes) -> None:
    (node.sysfs_root / "kernel/debug/qat_4xxx_0000:6b:00.0/heartbeat/status").write_bytes(content)
    assert code(perform(node, ReadHeartbeat(id=1, address=address(PF)))) is ErrorCode.KERNEL


@pytest.mark.parametrize("content", [b"\xff", b"x" * (32 * 1024 + 1)], ids=["binary", "too long"])
def test_a_malformed_device_configuration(node: Node, content: bytes) -> None:
    (node.sysfs_root / "kernel/debug/qat_4xxx_0000:6b:00.0/dev_cfg").write_bytes(content)
    assert code(perform(node, ReadDeviceConfig(id=1, address=address(PF)))) is ErrorCode.KERNEL


def test_without_debugfs_files_it_is_unavailable(node: Node) -> None:
    (node.sysfs_root / "kernel/debug/qat_4xxx_0000:6b:00.0/dev_cfg").unlink()
    assert code(perform(node, ReadDeviceConfig(id=1, address=address(PF)))) is ErrorCode.UNAVAILABLE
    SysfsTree.bind(_tree(node), PF, "vfio-pci")
    assert code(perform(node, ReadHeartbeat(id=1, address=address(PF)))) is ErrorCode.UNAVAILABLE


def test_a_vf_has_no_heartbeat_and_a_missing_device_has_vanished(node: Node) -> None:
    assert code(perform(node, ReadHeartbeat(id=1, address=address(VF)))) is ErrorCode.DENIED
    assert code(perform(node, ReadHeartbeat(id=1, address=address("6b:00.7")))) is ErrorCode.VANISHED


def _tree(node: Node) -> SysfsTree:
    tree = SysfsTree.__new__(SysfsTree)
    tree.root = node.sysfs_root
    return tree
