"""The server ends, crashes, is replaced while pods run, with the helper there or away: devices stay, and come back."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator

import pytest

from kubelet.measured import Timed
from kubelet.nodes import CY, DC, EVERY_ALLOCATABLE, EVERY_DRIVER, EVERY_RESOURCE, ONE_PF
from kubelet.production import ProductionNode, production_node
from kubelet.real_kubelet import RealKubelet
from qat_server.kubelet.registration.directories import Registration

Nodes = ProductionNode[RealKubelet]
ENDS = pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
NOTHING = dict.fromkeys(EVERY_ALLOCATABLE, 0)


@contextlib.asynccontextmanager
async def with_pods(registration: Registration) -> AsyncIterator[tuple[Nodes, dict[str, set[str]]]]:
    """A node on which two pods run, and their devices: they must be the same in the end, and the kubelet unharmed."""
    async with production_node(EVERY_RESOURCE, EVERY_DRIVER, registration=registration) as node:
        await node.start(EVERY_ALLOCATABLE)
        await node.until_bound()
        pods = {
            name: set((await node.kubelet.allocate(name, asked)).devices)
            for name, asked in (("a", [("main", CY, 2), ("side", DC, 1)]), ("b", [("main", CY, 3)]))
        }
        yield node, pods
        for name, devices in pods.items():
            assert await node.kubelet.devices_of(name) == devices
        await node.settled(EVERY_ALLOCATABLE)
        await node.admit("late", [("main", CY, 3), ("side", DC, 2)])
        assert await node.kubelet.restart() == (), "and all pods are admitted once more"
        await node.wait(EVERY_ALLOCATABLE)


@ENDS
async def test_a_server_that_ends_and_starts_again(how: signal.Signals, registration: Registration) -> None:
    what = f"server ended by {how.name}: its next start to allocatable"
    async with with_pods(registration) as (node, _), Timed(what, 1, registration) as timed:
        for _ in range(3):
            bound = node.audit_log.read_text().count('"BindDriver"')
            await node.stop_server(how)
            await node.wait(NOTHING)
            await timed.add(await node.start_again(EVERY_ALLOCATABLE))
            assert node.audit_log.read_text().count('"BindDriver"') == bound, "what is bound is not bound again"


@ENDS
async def test_a_server_that_starts_without_a_helper(how: signal.Signals, registration: Registration) -> None:
    """What is bound is served, if the kubelet can be told of it: at its socket the helper is needed for that."""
    async with with_pods(registration) as (node, _):
        await node.stop_helper(signal.SIGKILL)
        await node.stop_server(how)
        node.start_server()
        await node.until_status("all are found, and said to be not ready", lambda s: len(s.vfs) == 17 and not s.ready)
        if registration is Registration.PLUGIN_WATCHER:
            await node.wait({CY: 8, DC: 3})
        else:
            await node.wait(NOTHING)
        async with Timed("helper's start to allocatable, the server waiting", 1, registration) as timed:
            began = time.monotonic()
            node.start_helper()
            await node.wait(EVERY_ALLOCATABLE)
            await timed.add(time.monotonic() - began)


@ENDS
@pytest.mark.parametrize("kill_helper", [False, True], ids=["", "helper-killed"])
async def test_a_rolling_update(how: signal.Signals, kill_helper: bool, registration: Registration) -> None:
    """Old and new overlap: the kubelet may see the old stream's end after the new registration, which it then drops."""
    async with with_pods(registration) as (node, _):
        what = f"rolling update, old server ended by {how.name}: until allocatable"
        async with Timed(what, 1, registration) as timed:
            for _ in range(3):
                old = await node.replace_server()
                assert await node.kubelet.allocatable() == EVERY_ALLOCATABLE, "the old one serves until it ends"
                if kill_helper:
                    await node.stop_helper(signal.SIGKILL)
                began = time.monotonic()
                old.send_signal(how)
                if kill_helper:
                    node.start_helper()
                await asyncio.to_thread(old.wait, 60)
                await until_served_anew(node)
                await timed.add(time.monotonic() - began)
                await node.settled(EVERY_ALLOCATABLE)


async def until_served_anew(node: Nodes) -> None:
    """Registered by the new server, so that a pod is admitted."""
    await node.until_status("the new server is registered", lambda status: status.ready)
    await node.wait(EVERY_ALLOCATABLE)
    await node.admit("probe", [("main", name, 1) for name in (CY, DC)])
    await node.kubelet.free("probe")


async def test_a_rolling_update_while_pods_come_and_go(registration: Registration) -> None:
    """A pod meets one server or the other, or is refused with a reason; it never harms the kubelet."""
    async with production_node(ONE_PF, registration=registration) as node:
        await node.start({CY: 4})
        refusals: list[str] = []
        done = asyncio.Event()

        async def churn(name: str) -> int:
            admitted = 0
            while not done.is_set():
                try:
                    await node.kubelet.allocate(name, [("main", CY, 2)])
                except Exception as error:  # noqa: BLE001 - what it was is looked at below
                    refusals.append(str(error))
                    await asyncio.sleep(0.002)
                else:
                    admitted += 1
                    await node.kubelet.free(name)
            return admitted

        churning = [asyncio.create_task(churn(name)) for name in ("a", "b")]
        for how in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
            old = await node.replace_server()
            old.send_signal(how)
            await asyncio.to_thread(old.wait, 60)
            await node.until_status("the new server is registered", lambda status: status.ready)
            await node.wait({CY: 4})
        done.set()
        assert min(await asyncio.gather(*churning)) > 0
        assert node.kubelet.alive
        await node.settled({CY: 4})
        await node.free_in_the_end({CY: 4})  # nothing has leaked
        known: tuple[str, ...] = (
            "no healthy devices present",
            "has been stopped",
            "Unavailable",
            "Canceled",
            "being withdrawn",
        )
        known += ("requested number of devices unavailable", "EOF", "connection")
        assert [text for text in refusals if not any(word in text for word in known)] == []


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_the_helper_dies_while_the_kubelet_is_away(kill: bool, registration: Registration) -> None:
    async with with_pods(registration) as (node, _):
        await node.kubelet.stop(kill)
        await node.stop_helper(signal.SIGKILL)
        await node.kubelet.start()
        await node.until_status("it is said", lambda status: not status.helper.connected)
        async with Timed("helper's start to allocatable, the server waiting", 1, registration) as timed:
            began = time.monotonic()
            node.start_helper()
            await node.wait(EVERY_ALLOCATABLE)
            await timed.add(time.monotonic() - began)


async def test_without_a_helper_what_is_registered_goes_on(registration: Registration) -> None:
    async with production_node(ONE_PF, registration=registration) as node:
        await node.start({CY: 4})
        await node.stop_helper(signal.SIGKILL)
        await node.until_status("it is said", lambda status: not status.helper.connected)
        pod = await node.kubelet.allocate("pod", [("main", CY, 2)])
        assert len(pod.containers["main"].envs) == 2
        node.kernel.unbind("0000:6b:00.4")
        await node.wait({CY: 3})
        node.start_helper()
        await node.wait({CY: 4})
        assert await node.kubelet.devices_of("pod") == set(pod.devices)
