"""A hostile server against the kubelet's own code: names, floods, watches, and what the kubelet cannot prevent."""

import itertools
import os
import socket
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from kubelet.answers import KubeletPanicError
from kubelet.hostile_server import Attack, HostilePlugin, ask, attack, requests
from kubelet.nodes import CY
from kubelet.real_kubelet import Claim
from kubelet.test_plugin_watcher import Plugin
from qat_helper.policy import BUILTIN_RATES
from support.conditions import until

GPU = "nvidia.com/gpu"
NAMES = (
    GPU,
    "intel.com/qat",
    "qat.intel.com/gpu",
    "qat.intel.com/cy\n",
    "qat.intel.com/../nvidia.com/gpu",
    "qat.intel.com.example.org/cy",
    "QAT.intel.com/cy",
    "cpu",
    "",
)
ENDPOINTS = ("../nvidia.sock", "../kubelet.sock", "/etc/passwd", "a/../cy.sock", ".cy.sock", "cy.sock\0", "")


async def test_it_registers_no_name_but_ours_and_no_endpoint_elsewhere() -> None:
    async with attack() as node:
        plugin = HostilePlugin()
        async with plugin.at(node.sockets / "cy.sock"), plugin.at(node.kubelet.plugin_directory / "nvidia.sock"):
            with node.connect() as client:
                for name in NAMES:
                    assert await node.register(client, name, "cy.sock") != "", name
                for endpoint in ENDPOINTS:
                    assert await node.register(client, CY, endpoint) != "", endpoint
                assert await node.kubelet.capacity() == {}
                assert await node.register(client, CY, "cy.sock") == ""
            await node.kubelet.wait_for(capacity={CY: 1})
            assert await node.kubelet.capacity() == {CY: 1}
        lines = [line for line in node.running.audit_lines() if line.get("operation") == "RegisterResource"]
        denied = {
            line["arguments"]["resource"] for line in lines if line.get("result", {}).get("rule") == "resource-name"
        }
        assert {GPU, "qat.intel.com/gpu", "intel.com/qat"} <= denied
        assert lines[-1]["arguments"] == {"resource": CY, "endpoint": "cy.sock", "wait_ms": 0}
        assert (lines[-1]["verdict"], lines[-1]["result"]) == ("ok", {"accepted": True})


async def test_what_the_kubelet_refuses_is_in_the_log_as_not_accepted() -> None:
    async with attack() as node:
        (node.sockets / "cy.sock").symlink_to(node.kubelet.registration_socket)
        with node.connect() as client:
            assert await node.register(client, CY, "cy.sock") == "the kubelet refuses"
        last = node.running.audit_lines()[-1]
        assert (last["operation"], last["verdict"], last["result"]) == ("RegisterResource", "ok", {"accepted": False})
        assert node.kubelet.alive


async def test_a_link_as_its_endpoint_gives_our_name_to_another_plugin() -> None:
    """The kubelet follows it, as root. No other name is affected; SECURITY.md says what is left."""
    async with attack() as node:
        plugin = HostilePlugin(("gpu0", "gpu1"))
        async with plugin.at(node.kubelet.plugin_directory / "nvidia.sock") as other:
            (node.sockets / "cy.sock").symlink_to(other)
            with node.connect() as client:
                assert await node.register(client, CY, "cy.sock") == ""
            await node.kubelet.wait_for(capacity={CY: 2})
            assert await node.kubelet.capacity() == {CY: 2}


async def test_connections_of_the_kubelet_that_it_keeps_are_few() -> None:
    async with attack() as node:
        with node.connect() as client:
            ask(client, {"op": "ReadHeartbeat", "address": [0, 0x6B, 0, 0]})
        before = node.connections()
        kept: list[socket.socket] = []
        with ExitStack() as clients:
            peers = [clients.enter_context(node.connect()) for _ in range(8)]
            for peer, request in zip(itertools.cycle(peers), itertools.islice(requests(), 120), strict=False):
                kept += ask(peer, request)[1]
                assert len(kept) < 20 or await few(node, before), "the kubelet has all of them open"
            assert len(kept) >= 40
            assert await few(node, before)
        await until(lambda: node.connections() == before, 20)  # each ends with the connection of the peer that got it
        for each in kept:
            each.close()


async def few(node: Attack, before: int) -> bool:
    """Whether the kubelet comes to have at most four of these open."""
    try:
        await until(lambda: node.connections() <= before + 4, 20)
    except TimeoutError:
        return False
    return True


async def test_registrations_that_the_kubelet_keeps_a_connection_for_are_limited() -> None:
    """The kubelet keeps one for each registration whose stream the plugin leaves open, also of the same name."""
    limit = BUILTIN_RATES["RegisterResource"].burst
    async with attack() as node:
        plugin = HostilePlugin()
        async with plugin.at(node.sockets / "cy.sock"):
            with node.connect() as client:
                answers = [await node.register(client, CY, "cy.sock") for _ in range(limit + 50)]
            assert set(answers) == {"", "rates.RegisterResource"}
            assert limit <= answers.count("") < limit + 40, "one more each ten seconds"
            await until(lambda: plugin.streams == answers.count(""))


def policy_of_manifests() -> str:
    """What every installation's policy says of the kubelet's directories; hardened adds nothing to it."""
    return (Path(__file__).parents[2] / "deployments/base/policy/serve.toml").read_text()


REGISTRY = {"op": "PrepareSocketDirectory", "directory": "plugins-registry"}


async def test_hardened_keeps_it_from_the_plugin_watchers_directory() -> None:
    async with attack(policy=policy_of_manifests()) as node:
        before = node.watches()
        assert before > 0
        with node.connect() as client:
            answer, _ = ask(client, REGISTRY)
            assert (answer["reply"], answer.get("rule")) == ("Failure", "directories")
            async with HostilePlugin().at(node.sockets / "cy.sock"):
                assert await node.register(client, CY, "cy.sock") == ""
        assert os.listdir(node.kubelet.registry_directory) == []
        assert node.watches() == before
        assert await node.kubelet.claimed() == ()


async def test_the_plugin_watchers_directory_gives_it_other_types_of_plugins_and_watches() -> None:
    """The consequences of --registration=plugin-watcher: docs/helper.md, SECURITY.md and docs/kubelet.md state them."""
    async with attack() as node, AsyncExitStack() as served:
        registry = node.kubelet.registry_directory / "qat.intel.com"
        with node.connect() as client:
            assert ask(client, REGISTRY)[0]["reply"] == "Done"
        before = node.watches()
        for number in range(200):
            (registry / f"d{number}").mkdir()
        await until(lambda: node.watches() >= before + 200)
        for kind in ("CSIPlugin", "DRAPlugin"):
            plugin = Plugin(kind=kind)
            plugin.info.name = "csi.example.org"
            await served.enter_async_context(plugin.at(registry / f"{kind}.sock"))
        claimed: tuple[Claim, ...] = ()
        while {each.type for each in claimed} != {"CSIPlugin", "DRAPlugin"}:
            claimed = await node.kubelet.claimed()
        assert {each.name for each in claimed} == {"csi.example.org"}


async def test_a_list_that_is_cleared_during_allocate_crashes_the_kubelet() -> None:
    """A defect of the kubelet that no device plugin's owner can prevent: docs/kubelet.md has the report."""
    async with attack() as node:
        plugin = HostilePlugin()

        async def clear() -> None:
            plugin.list(())
            while (await node.kubelet.devices())[CY]:
                pass

        plugin.before_allocate = clear
        async with plugin.at(node.sockets / "cy.sock"):
            with node.connect() as client:
                assert await node.register(client, CY, "cy.sock") == ""
            await node.kubelet.wait_for(allocatable={CY: 1})
            with pytest.raises(KubeletPanicError, match="allocateContainerResources"):
                await node.kubelet.allocate("pod", [("main", CY, 1)])
