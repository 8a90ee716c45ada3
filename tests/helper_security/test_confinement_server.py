"""The server's sandbox, tried from inside once it serves; and a whole node with both sandboxes."""

import os
from pathlib import Path

import pytest

from helper_security.forbidden import unexpected
from helper_security.test_confinement import LACKING, answers, build
from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import RunningNode, running_node
from support.conditions import until

CY = "qat.intel.com/cy"
ONE_PF = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=2),))
WHOLE = dict.fromkeys(("capabilities", "no-new-privs", "no-core-dumps", "landlock", "seccomp"), "")


async def served(node: RunningNode) -> None:
    node.start_helper()
    node.start_server()
    await node.until("all are served", lambda: node.kubelet.allocatable() == {CY: 2})


async def test_once_it_serves_the_server_cannot_do_what_is_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").write_text("untouched\n")
    async with running_node(ONE_PF, ("--require-sandbox",)) as node:
        options = node.server_command()[1:]
        monkeypatch.setattr(node, "server_command", lambda: [*build("build_server.py", tmp_path), *options])
        await served(node)
        tried = await node.until(
            "it has tried", lambda: len(found := answers(node.log("server"))) == 2 and found, seconds=60
        )
        for results in tried or []:
            assert unexpected(results) == {}
        assert os.listdir(tmp_path) == ["there"]
        await node.kubelet.allocate("pod", [("main", CY, 1)])
        with capsys.disabled():
            number = len((tried or [{}])[0])
            print(f"\n{number} forbidden things tried in the server's loop and in a thread: each refused")


async def test_both_sandboxes_are_in_status_and_metrics() -> None:
    async with running_node(ONE_PF, ("--require-sandbox",)) as node:
        await served(node)
        status = await node.status()
        assert status.sandbox == WHOLE
        assert {layer for layer, lack in status.helper.sandbox.items() if lack} == {"no-core-dumps"}, "--traceable"
        text = (await node.get("/metrics"))[1].decode()
        for layer in WHOLE:
            assert f'qat_plugin_sandbox{{layer="{layer}",process="server"}} 1.0' in text
        assert 'qat_plugin_sandbox{layer="no-core-dumps",process="helper"} 0.0' in text
        assert 'qat_plugin_sandbox{layer="seccomp",process="helper"} 1.0' in text
        assert "the helper's sandbox is incomplete" in node.log("server")


async def test_a_server_without_landlock_says_so_and_ends_when_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    before, why = LACKING["landlock"]
    async with running_node(ONE_PF) as node:
        plain = node.server_command()
        monkeypatch.setattr(node, "server_command", lambda: [*before, *plain])
        await served(node)
        status = await node.status()
        assert why in status.sandbox["landlock"]
        assert status.sandbox["seccomp"] == ""
        text = (await node.get("/metrics"))[1].decode()
        assert 'qat_plugin_sandbox{layer="landlock",process="server"} 0.0' in text
        await node.stop_server()
        monkeypatch.setattr(node, "server_command", lambda: [*before, *plain, "--require-sandbox"])
        node.start_server()
        assert node.server is not None
        assert node.server.wait(120) == 2
        assert "--require-sandbox: the sandbox is incomplete: landlock: " in node.log("server")
        node.server = None


async def test_log_files_are_written_and_rotated_in_the_sandbox(tmp_path: Path) -> None:
    options = ("--require-sandbox", "--logtostderr=false", f"--log_dir={tmp_path}", "--v=5")
    async with running_node(ONE_PF, options) as node:
        await served(node)

        def logged() -> bool:
            logs = [tmp_path / name for name in os.listdir(tmp_path) if ".log.INFO." in name]
            return any("resource registered" in path.read_text() for path in logs)

        await until(logged)  # the kubelet knows of a registration before the server has written it down
        assert await node.stop_server() == 0
        assert "cannot be written" not in node.log("server")
