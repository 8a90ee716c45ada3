"""VFs that vanish, go bad and come back, idle, held by a pod, or being given out: the kubelet never crashes."""

import asyncio
import signal
import time

import pytest

from kubelet.answers import AdmissionError
from kubelet.measured import Timed
from kubelet.nodes import CY, GENERIC, LONE, ONE_PF
from kubelet.production import production_node
from qat_simulation.kubelet.topology import TopologyPolicy

LONE_VFS = tuple(vf.address for vf in LONE.vfs)
QUICK = ("--health-interval=50ms",)
ALIGNED = pytest.mark.parametrize("policy", [TopologyPolicy.NONE, TopologyPolicy.RESTRICTED])


async def test_an_idle_vf_that_vanishes_and_comes_back() -> None:
    async with production_node(LONE) as node:
        await node.start({GENERIC: 4})
        await node.until_bound()
        async with (
            Timed("a VF vanishes: until the kubelet knows", 1) as going,
            Timed("a VF comes back: until the kubelet knows", 1) as coming,
        ):
            for address in LONE_VFS:
                began = time.monotonic()
                node.kernel.remove(address)
                await node.wait({GENERIC: 3})
                await going.add(time.monotonic() - began)
                assert (await node.kubelet.capacity())[GENERIC] == 4
                began = time.monotonic()
                node.kernel.rescan()
                await node.wait({GENERIC: 4})
                await coming.add(time.monotonic() - began)


@ALIGNED
async def test_a_pods_vf_that_vanishes_and_comes_back(policy: TopologyPolicy) -> None:
    async with production_node(LONE, policy=policy) as node:
        await node.start({GENERIC: 4})
        await node.until_bound()
        pod = await node.kubelet.allocate("pod", [("main", GENERIC, 2)])
        gone = pod.devices[0]
        node.kernel.remove(gone)
        await node.wait({GENERIC: 3})
        assert (await node.kubelet.capacity())[GENERIC] == 4
        assert (await node.kubelet.status("pod"))["main"][GENERIC][gone] == "Unhealthy"
        assert await node.kubelet.restart_container("pod", "main") == pod.containers["main"]
        with pytest.raises(AdmissionError):
            await node.kubelet.allocate("other", [("main", GENERIC, 3)])
        assert await node.kubelet.restart(kill=True) == ()
        await node.wait({GENERIC: 3})
        assert await node.kubelet.devices_of("pod") == set(pod.devices)
        node.kernel.rescan()
        await node.wait({GENERIC: 4})
        assert (await node.kubelet.status("pod"))["main"][GENERIC][gone] == "Healthy"
        assert await node.kubelet.allocate("pod", [("main", GENERIC, 2)]) == pod, "admitted anew, as after a restart"


async def test_what_is_gone_for_good_leaves_the_list_unless_a_pod_has_it() -> None:
    """Only after SETTLE (10 s) and a PodResources answer; then the pod is admitted anew, which asks for its device."""
    async with production_node(LONE, ("--resync-interval=200ms",), TopologyPolicy.RESTRICTED) as node:
        await node.start({GENERIC: 4})
        await node.until_bound()
        pod = await node.kubelet.allocate("pod", [("main", GENERIC, 1)])
        (held,) = pod.devices
        idle = next(address for address in LONE_VFS if address != held)
        async with Timed("a VF that nobody has vanishes for good: until it leaves the list", 12) as timed:
            began = time.monotonic()
            node.kernel.unplug(held)
            node.kernel.unplug(idle)
            await node.kubelet.wait_for(capacity={GENERIC: 3}, allocatable={GENERIC: 2}, seconds=60)
            await timed.add(time.monotonic() - began)
        assert {device.id for device in (await node.kubelet.devices())[GENERIC]} == {*LONE_VFS} - {idle}
        with pytest.raises(AdmissionError, match="no longer healthy"):
            await node.kubelet.allocate("pod", [("main", GENERIC, 1)])
        assert node.kubelet.alive


@ALIGNED
async def test_a_pods_vf_vanishes_while_the_server_is_away(policy: TopologyPolicy) -> None:
    """The new server has never seen the device, but the kubelet asks about it when the pod is admitted anew."""
    async with production_node(LONE, policy=policy) as node:
        await node.start({GENERIC: 4})
        await node.until_bound()
        pod = await node.kubelet.allocate("pod", [("main", GENERIC, 1)])
        await node.stop_server(signal.SIGKILL)
        node.kernel.unplug(pod.devices[0])
        await node.start_again({GENERIC: 3})
        assert await node.kubelet.capacity() == {GENERIC: 4}, "it is listed for as long as the pod has it"
        assert (await node.kubelet.status("pod"))["main"][GENERIC] == {pod.devices[0]: "Unhealthy"}
        with pytest.raises(AdmissionError, match="no longer healthy"):
            await node.kubelet.allocate("pod", [("main", GENERIC, 1)])
        assert node.kubelet.alive


@pytest.mark.parametrize("what", ["heartbeat", "unbound", "reset"])
@pytest.mark.parametrize("held", [False, True], ids=["idle", "held"])
async def test_vfs_that_go_bad_and_come_back(what: str, held: bool) -> None:
    async with production_node(ONE_PF, QUICK) as node:
        await node.start({CY: 4})
        await node.until_bound()
        devices = set((await node.kubelet.allocate("pod", [("main", CY, 2)])).devices) if held else set()
        pf = ONE_PF.pfs[0].address
        match what:
            case "heartbeat":
                node.kernel.set_heartbeat(pf, -1)
            case "unbound":
                await node.stop_helper()  # else it is bound again before one can look
                for number in range(1, 5):
                    node.kernel.unbind(f"0000:6b:00.{number}")
            case "reset":
                node.kernel.set_numvfs(pf, 0)
        await node.wait({CY: 0})
        assert await node.kubelet.capacity() == {CY: 4}
        with pytest.raises(AdmissionError, match="no healthy devices present"):
            await node.kubelet.allocate("other", [("main", CY, 1)])
        match what:
            case "heartbeat":
                node.kernel.set_heartbeat(pf, 0)
            case "unbound":
                node.start_helper()
            case "reset":
                node.kernel.set_numvfs(pf, 4)
        await node.wait({CY: 4})
        if held:
            assert await node.kubelet.devices_of("pod") == devices
        await node.kubelet.allocate("other", [("main", CY, 2)])


@ALIGNED
async def test_vfs_that_vanish_in_the_very_moment_of_allocate(policy: TopologyPolicy) -> None:
    """Each pod is refused, or has its devices."""
    async with production_node(LONE, policy=policy) as node:
        await node.start({GENERIC: 4})
        await node.until_bound()
        reasons = set()
        lead = 0.008  # seconds from the removal to the admission: soon about where the one or the other may win
        for n in range(50):
            removal = asyncio.create_task(asyncio.to_thread(node.kernel.remove, LONE_VFS[n % 4]))
            await passed(lead)
            admission = asyncio.create_task(node.kubelet.allocate("pod", [("main", GENERIC, 4)]))
            await removal
            try:
                pod = await admission
            except AdmissionError as error:
                lead = max(0.0, lead - 0.0007)
                reasons.add(error.message)
            else:
                lead += 0.0003
                assert len(pod.devices) == 4
                await node.kubelet.free("pod")
            await node.wait({GENERIC: 3})
            node.kernel.rescan()
            await node.wait({GENERIC: 4})
            assert (await node.kubelet.check()).violations == ()
        assert node.kubelet.alive
        assert await node.kubelet.allocatable_free() == {GENERIC: 4}
        clear = ("healthy", "unavailable", "it is gone", "locality")
        assert [reason for reason in reasons if not any(word in reason for word in clear)] == []


async def passed(seconds: float) -> None:
    """Short times exactly: no condition tells how far an admission is."""
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        await asyncio.sleep(0)
