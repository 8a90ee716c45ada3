"""The directory of the endpoints' sockets: not prepared by the helper, removed, or locked by another server."""

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path

import pytest

from qat_helper.operations.kubelet import MODE
from qat_server.helper_client.client import HelperClient
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.registration.directories import Registration
from qat_server.kubelet.sockets.endpoint_directory import DirectoryUnusableError, EndpointDirectory
from qat_server.kubelet.sockets.socket_files import move_into_place, remove_leftovers, temporary_path
from qat_shared.messages import SocketDirectory
from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import running_node
from support.conditions import until
from support.helper_process import needs_root, run_as_user

CY = "qat.intel.com/cy"
ONE_PF = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, numa_node=0),))


@pytest.mark.parametrize("way", list(Registration))
async def test_the_server_works_if_policy_forbids_to_prepare_it(
    way: Registration, helper_policy: Callable[[str], None]
) -> None:
    helper_policy('operations = ["BindDriver", "RegisterResource", "OpenPodResources"]\n')
    async with running_node(ONE_PF, (f"--registration={way}",)) as node:
        for each in ("device-plugins", "plugins_registry"):
            os.makedirs(node.kubelet.directory / each / "qat.intel.com", exist_ok=True)
        node.start_helper()
        await node.until("the helper listens", node.helper_socket.exists)
        node.start_server()
        await node.until("registered", lambda: node.kubelet.allocatable().get(CY) == 4)
        assert node.log("server").count("socket directory used as it is") == 1


async def test_with_the_plugin_watcher_a_server_restarts_without_an_audit_log() -> None:
    """With kubelet-socket it cannot: the helper connects to the kubelet only if it can write that to the audit log."""
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
def test_a_server_of_another_user_continues_after_the_last_one_was_killed() -> None:
    """Between the manifests and the systemd units uid and gid change, and the helper changes the directory's group."""

    async def work(path: Path) -> None:
        helper = HelperClient(path / "no-helper.sock", Counters())
        async with EndpointDirectory(helper, SocketDirectory.DEVICE_PLUGINS, path, path).locked():
            remove_leftovers(path)
            with temporary_path(path) as temporary, socket.socket(socket.AF_UNIX) as endpoint:
                endpoint.bind(temporary)
                move_into_place(temporary, path / "cy.sock")

    with tempfile.TemporaryDirectory(prefix="qat-", dir="/tmp") as parent:
        os.chmod(parent, 0o755)  # noqa: S103 - all these users traverse it
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
    with pytest.raises(DirectoryUnusableError, match="is not accessible to this server"):
        await work


@pytest.mark.parametrize("way", list(Registration))
async def test_if_it_is_recreated_both_report_that_they_must_be_restarted(way: Registration) -> None:
    """Their sandboxes allow the directories that existed when they started."""
    async with running_node(ONE_PF, (f"--registration={way}",)) as node:
        node.start_helper()
        node.start_server()
        await node.until("registered", lambda: node.kubelet.allocatable().get(CY) == 4)
        await node.kubelet.stop()
        for each in ("device-plugins", "plugins_registry"):
            shutil.rmtree(node.kubelet.directory / each, ignore_errors=True)
        await node.kubelet.start()
        helpers_reason = "restart it if the kubelet's directory was recreated"
        await node.until("the helper reports it", lambda: helpers_reason in node.log("server"), 40)
        server, node.server = node.server, None  # which exits on its own
        assert server is not None
        await node.stop_helper()
        node.start_helper()
        await node.until("the server ends", lambda: server.poll() is not None, 40)
        assert server.returncode == 1
        assert "if the directory was recreated, restart the helper and the server" in node.log("server")
        node.start_server()
        await node.until("registered again", lambda: node.kubelet.allocatable().get(CY) == 4, 40)
        await node.until_status("ready", lambda status: status.ready)
        assert "Traceback" not in node.log("server")


async def test_a_missing_directory_is_reported_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "device-plugins" / "qat.intel.com"
    helper = HelperClient(tmp_path / "helper.sock", Counters())
    directory = EndpointDirectory(helper, SocketDirectory.DEVICE_PLUGINS, path, tmp_path)
    with pytest.raises(DirectoryUnusableError) as caught:
        async with directory.locked():
            pass
    assert str(caught.value) == (
        f"{path} does not exist: mount the kubelet's device-plugins/qat.intel.com there, which the helper creates for "
        "this server's group, or set --kubelet-dir; if the directory was recreated, restart the helper and the server"
    )


@pytest.mark.parametrize("way", list(Registration), ids=lambda way: f"then-{way}")
async def test_two_servers_never_run_at_once_however_they_register(way: Registration) -> None:
    async with running_node(ONE_PF) as node:
        node.start_helper()
        node.start_server()
        await node.until("registered", lambda: node.kubelet.allocatable().get(CY) == 4)
        first, node.server = node.server, None
        assert first is not None
        node.add_server_options(f"--registration={way}")
        node.start_server()
        await until(lambda: "another server is running" in node.log("server"))
        status, body = await node.get("/readyz")
        assert status == 503
        assert body.startswith(b"another server is running: waiting for it to exit (")
        before = node.log("server").count("resource served")
        first.terminate()
        assert first.wait(120) == 0
        await node.until("the second serves", lambda: node.log("server").count("resource served") > before)
        await node.until("registered", lambda: node.kubelet.allocatable().get(CY) == 4)
        await node.until_status("ready", lambda status: status.ready)
