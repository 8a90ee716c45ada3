"""The directory of the endpoints' sockets: not prepared by the helper, gone, or another server's."""

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path

import pytest

from qat_helper.kubelet import MODE
from qat_server.helper_client.client import HelperClient
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.registration.directories import Registration
from qat_server.kubelet.sockets.endpoint_directory import DirectoryUnusableError, EndpointDirectory
from qat_server.kubelet.sockets.grpc_socket import private_name, put, remove_leftovers
from qat_shared.messages import SocketDirectory
from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import running_node
from support.conditions import until
from support.helper_process import needs_root, run_as_user

CY = "qat.intel.com/cy"
ONE_PF = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, numa_node=0),))


@pytest.mark.parametrize("way", list(Registration))
async def test_a_helper_that_may_not_prepare_it_is_done_without(
    way: Registration, helper_policy: Callable[[str], None]
) -> None:
    helper_policy('operations = ["BindDriver", "OpenKubeletSocket"]\n')
    async with running_node(ONE_PF, (f"--registration={way}",)) as node:
        for each in ("device-plugins", "plugins_registry"):
            os.makedirs(node.kubelet.directory / each / "qat.intel.com", exist_ok=True)
        node.start_helper()
        await node.until("the helper listens", node.helper_socket.exists)
        node.start_server()
        await node.until("registered", lambda: node.kubelet.allocatable().get(CY) == 4)
        assert node.log("server").count("socket directory used as it is") == 1


async def test_an_audit_log_that_was_moved_away_does_not_keep_a_watched_server_from_starting_again() -> None:
    """With kubelet-socket, connecting to the kubelet is an operation that is not done without its line in the log."""
    async with running_node(ONE_PF, ("--registration=plugin-watcher",)) as node:
        node.start_helper()
        node.start_server()
        await node.until("registered", lambda: node.kubelet.allocatable().get(CY) == 4)
        await node.until_status("all is bound", lambda status: status.ready)
        node.audit_log.rename(node.audit_log.with_suffix(".1"))
        await node.stop_server()
        await node.until("withdrawn", lambda: node.kubelet.allocatable().get(CY) == 0)
        node.start_server()
        await node.until("registered", lambda: node.kubelet.allocatable().get(CY) == 4, 40)


@needs_root
def test_a_server_that_is_another_user_goes_on_where_the_last_one_was_killed() -> None:
    """From the manifests to the systemd units and back: uid and gid change, and the helper gives the directory on."""

    async def work(path: Path) -> None:
        helper = HelperClient(path / "no-helper.sock", Counters())
        async with EndpointDirectory(helper, SocketDirectory.DEVICE_PLUGINS, path, path).held():
            remove_leftovers(path)
            with private_name(path) as private, socket.socket(socket.AF_UNIX) as endpoint:
                endpoint.bind(private)
                put(private, path / "cy.sock")

    with tempfile.TemporaryDirectory(prefix="qat-", dir="/tmp") as parent:
        os.chmod(parent, 0o755)  # noqa: S103 - all those users go through it
        path = Path(parent, "qat.intel.com")
        path.mkdir()
        for user in (65532, 65533, 65532):
            os.chown(path, 0, user)
            os.chmod(path, MODE)
            assert run_as_user(user, user, [partial(os.umask, 0o077), lambda: asyncio.run(work(path))]) == 0
            assert (path / "cy.sock").stat().st_uid == user
        os.chown(path, 0, 0)
        assert run_as_user(65532, 65532, [lambda: asyncio.run(refused(work(path)))]) == 0


async def refused(work: Coroutine[None, None, None]) -> None:
    with pytest.raises(DirectoryUnusableError, match="is not open to this server"):
        await work


@pytest.mark.parametrize("way", list(Registration))
async def test_when_it_was_made_anew_both_say_that_they_must_be_started_again(way: Registration) -> None:
    """Their sandboxes are of the directories that were there at their start."""
    async with running_node(ONE_PF, (f"--registration={way}",)) as node:
        node.start_helper()
        node.start_server()
        await node.until("registered", lambda: node.kubelet.allocatable().get(CY) == 4)
        await node.kubelet.stop()
        for each in ("device-plugins", "plugins_registry"):
            shutil.rmtree(node.kubelet.directory / each, ignore_errors=True)
        await node.kubelet.start()
        await node.until("the helper says it", lambda: "directory was recreated" in node.log("server"), 40)
        server, node.server = node.server, None  # which is to end by itself
        assert server is not None
        await node.stop_helper()
        node.start_helper()
        await node.until("the server ends", lambda: server.poll() is not None, 40)
        assert server.returncode == 1
        assert "if it was made anew, start helper and server again" in node.log("server")
        node.start_server()
        await node.until("registered again", lambda: node.kubelet.allocatable().get(CY) == 4, 40)
        await node.until_status("ready", lambda status: status.ready)
        assert "Traceback" not in node.log("server")


async def test_one_that_is_not_there_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "device-plugins" / "qat.intel.com"
    helper = HelperClient(tmp_path / "helper.sock", Counters())
    directory = EndpointDirectory(helper, SocketDirectory.DEVICE_PLUGINS, path, tmp_path)
    with pytest.raises(DirectoryUnusableError) as caught:
        async with directory.held():
            pass
    assert str(caught.value) == (
        f"{path} is not there: mount the kubelet's device-plugins/qat.intel.com there, which the helper makes for this "
        "server's group, or give the kubelet's directory with --kubelet-dir; if it was made anew, start helper and "
        "server again"
    )


@pytest.mark.parametrize("way", list(Registration), ids=lambda way: f"then-{way}")
async def test_two_servers_do_not_work_at_once_however_they_register(way: Registration) -> None:
    async with running_node(ONE_PF) as node:
        node.start_helper()
        node.start_server()
        await node.until("registered", lambda: node.kubelet.allocatable().get(CY) == 4)
        first, node.server = node.server, None
        assert first is not None
        node.add_server_options(f"--registration={way}")
        node.start_server()
        await until(lambda: "another server works here" in node.log("server"))
        status, body = await node.get("/readyz")
        assert status == 503
        assert body.startswith(b"another server works here: waiting for its end (")
        before = node.log("server").count("resource served")
        first.terminate()
        assert first.wait(120) == 0
        await node.until("the second serves", lambda: node.log("server").count("resource served") > before)
        await node.until("registered", lambda: node.kubelet.allocatable().get(CY) == 4)
        await node.until_status("ready", lambda status: status.ready)
